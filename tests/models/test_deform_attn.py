"""Deformable attention's tables of sizes, its merged product, and the modes it is called in."""

import pytest
import torch

from mmvig.kernels import ms_deform_attn, sampling_points
from mmvig.models.layers.deform_attn import (
    MAX_LEVELS,
    DeformableAttention,
    Levels,
    cached_levels,
    make_levels,
)

CPU = torch.device('cpu')
SHAPES = [(4, 6), (2, 3), (1, 2)]


def test_tables() -> None:
    levels = make_levels([(2, 3), (1, 2)], CPU)
    assert levels.sizes == [6, 2]
    assert levels.spatial_shapes.tolist() == [[2, 3], [1, 2]]
    assert levels.start_index.tolist() == [0, 6]
    torch.testing.assert_close(levels.pixel, torch.tensor([[1 / 3, 1 / 2], [1 / 2, 1]]))
    centers = levels.centers
    torch.testing.assert_close(centers[:2], torch.tensor([[1 / 6, 1 / 4], [1 / 2, 1 / 4]]))
    torch.testing.assert_close(
        centers[5:], torch.tensor([[5 / 6, 3 / 4], [0.25, 0.5], [0.75, 0.5]])
    )


def test_tables_are_made_once_for_each_list_of_sizes() -> None:
    levels = make_levels(SHAPES, CPU)
    assert make_levels(list(SHAPES), CPU) is levels
    assert levels in cached_levels()
    for width in range(1, MAX_LEVELS + 1):
        make_levels([(1, width)], CPU)
    assert len(cached_levels()) == MAX_LEVELS
    assert make_levels(SHAPES, CPU) is not levels


def test_training_may_use_tables_that_inference_made() -> None:
    attn = DeformableAttention(8, num_heads=2, num_levels=3)
    grid, levels = [(5, 3)], [(7, 3), (3, 2), (2, 1)]
    query, feat = torch.randn(1, 15, 8), torch.randn(1, 29, 8)
    with torch.inference_mode():
        attn(query, feat, make_levels(grid, CPU), make_levels(levels, CPU))
    attn(query, feat, make_levels(grid, CPU), make_levels(levels, CPU)).sum().backward()
    assert attn.sampling_offsets.weight.grad is not None


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_merged_product_is_the_two_linears(dtype: torch.dtype) -> None:
    attn = DeformableAttention(8, num_heads=2, num_levels=3).to(dtype)
    for param in attn.parameters():
        torch.nn.init.normal_(param)
    grid, levels = Levels(((4, 6),), CPU), Levels(tuple(SHAPES), CPU)
    query, feat = (torch.randn(2, n, 8, dtype=dtype) for n in (24, 32))

    offsets = attn.sampling_offsets(query).unflatten(-1, (2, 3, 4, 2))
    sizes = levels.spatial_shapes.flip(-1)[:, None]
    locations = grid.centers[:, None, None, None] + offsets / sizes
    weights = attn.attention_weights(query).unflatten(-1, (2, 12)).softmax(-1)
    value = attn.value_proj(feat).unflatten(-1, (2, -1))
    args = (levels.spatial_shapes, levels.start_index, locations, weights.unflatten(-1, (3, 4)))
    expected = attn.output_proj(ms_deform_attn(value, *args))
    torch.testing.assert_close(attn(query, feat, grid, levels), expected, rtol=1e-4, atol=1e-5)


def test_locations_are_float32_under_autocast() -> None:
    attn = DeformableAttention(8, num_heads=2, num_levels=3)
    grid, levels = Levels(((4, 6),), CPU), Levels(tuple(SHAPES), CPU)
    with torch.autocast('cpu', torch.bfloat16):
        points = attn.points(torch.randn(2, 24, 8))
        table = (grid.centers, levels.pixel)
        locations, weights = sampling_points(*points, table, (2, 3, 4))
    assert points[0].dtype == torch.bfloat16
    assert (locations.dtype, weights.dtype) == (torch.float32, torch.float32)
