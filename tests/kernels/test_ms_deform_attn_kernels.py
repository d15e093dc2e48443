"""The Triton kernels of `ms_deform_attn` against its definition in float64.

On a GPU, or on the CPU under Triton's interpreter (`TRITON_INTERPRET=1`, which must be set before
Triton is imported: `test_ms_deform_attn.py` runs this file so).
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmvig.doctor.ms_deform_attn import COLUMNS, KINDS, LEVELS, TOLERANCE, draw, measure
from tests.kernels.interpreter import DEVICE, GPU, skip_without_kernels

skip_without_kernels()

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# The interpreter is slow, and multiplies bfloat16 matrices wrongly, bit patterns as integers.
DTYPES = [(FP32, FP32), (FP16, FP16)]
DTYPES += [(FP16, FP32), (BF16, FP32), (BF16, BF16)] if GPU else []
MAPS = LEVELS if GPU else [(2, 8), (0, 3), (1, 1)]
BATCH, QUERIES = (2, 133) if GPU else (1, 5)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New memory is full of NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(inputs: list[Tensor]) -> None:
    for name, error in zip(COLUMNS, measure(inputs), strict=True):
        assert error <= TOLERANCE[inputs[0].dtype], f'{name}: error {error:.1e}'


@pytest.mark.parametrize('dtypes', DTYPES, ids=str)
@pytest.mark.parametrize('kind', KINDS)
def test_kinds_of_location(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(draw(kind, BATCH, QUERIES, 2, 16, 4, MAPS, *dtypes, DEVICE))


@pytest.mark.parametrize('dtype', [FP32, BF16] if GPU else [FP32])
@pytest.mark.parametrize(
    ('b', 'q', 'h', 'd', 'p', 'levels'),
    [
        (1, 1, 1, 8, 1, [(1, 1)]),
        (2, 1, 2, 24, 1, [(1, 1), (1, 9), (9, 1)]),
        (1, 7, 1, 96, 5, [(0, 4), (3, 5), (4, 0), (2, 2)]),
        (1, 150, 1, 8, 6, [(3, 17)]),
        (1, 3, 1, 256, 2, [(5, 7), (2, 2)]),
    ],
)
def test_sizes(
    b: int, q: int, h: int, d: int, p: int, levels: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    check(draw('random', b, q, h, d, p, levels, dtype, FP32, DEVICE))


def test_any_strides_and_alignment() -> None:
    value, shapes, starts, locations, weights, grad = draw(
        'random', BATCH, QUERIES, 2, 16, 4, MAPS, FP32, FP32, DEVICE
    )
    spread = value.transpose(1, 3).contiguous().transpose(1, 3)
    check([spread, shapes, starts, locations, weights, grad])
    view = torch.cat([value, value], 2)[:, :, 2:]
    shifted = torch.cat([locations.new_zeros(1), locations.flatten()])[1:].view_as(locations)
    check([view, shapes.t().contiguous().t(), starts.int(), shifted, weights, grad])
    check([value, shapes.int(), starts, locations.mT.contiguous().mT, weights, grad])


def test_levels_with_gaps_and_overlaps() -> None:
    inputs = draw('random', 1, 9, 2, 16, 4, [(6, 5), (4, 7)], FP32, FP32, DEVICE)
    inputs[2] = torch.tensor([3, 20], device=DEVICE)
    check(inputs)


def test_level_beyond_value_counts_as_empty() -> None:
    from mmvig.kernels.ms_deform_attn_bwd import backward
    from mmvig.kernels.ms_deform_attn_fwd import forward

    inputs = draw('random', 1, 5, 1, 16, 2, [(4, 4), (3, 3)], FP32, FP32, DEVICE)
    beyond, empty = list(inputs), list(inputs)
    beyond[2] = torch.tensor([0, 17], device=DEVICE)
    empty[1] = torch.tensor([(4, 4), (0, 0)], device=DEVICE)
    assert torch.equal(forward(*beyond[:5]), forward(*empty[:5]))
    for x, y in zip(backward(*beyond), backward(*empty), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize('where', [float('nan'), float('inf'), -float('inf'), 1e30])
def test_locations_that_are_nowhere_give_zero(where: float) -> None:
    from mmvig.kernels.ms_deform_attn_bwd import backward
    from mmvig.kernels.ms_deform_attn_fwd import forward

    inputs = draw('random', 1, 5, 1, 16, 2, MAPS, FP32, FP32, DEVICE)
    inputs[3] = torch.full_like(inputs[3], where)
    for x in (forward(*inputs[:5]), *backward(*inputs)):
        assert not x.any()
