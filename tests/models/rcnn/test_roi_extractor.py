"""RoI features: mmdet's in float32, and boxes that half precision leaves alone."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmvig import mmcv_ext

from .conftest import random_boxes

SETTINGS = dict(
    roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
    out_channels=4,
    featmap_strides=[4, 8, 16, 32],
)


def build(kind: str, **settings: object) -> nn.Module:
    from mmdet.registry import MODELS

    return MODELS.build({'type': kind, **SETTINGS, **settings})


def pyramid(height: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 4, height // s, width // s, dtype=dtype) for s in (4, 8, 16, 32)]


def regions(count: int, high: int) -> Tensor:
    boxes = random_boxes(count, high=high)
    return torch.cat([torch.arange(count)[:, None] % 2, boxes], 1)


@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('factor', [None, 1.5])
def test_features_and_gradients(factor: float | None, sampling_ratio: int) -> None:
    layer = dict(SETTINGS['roi_layer'], sampling_ratio=sampling_ratio)
    rois = regions(40, high=128)
    rois[:5, 1:] += 100  # across the border and beyond it
    maps = pyramid(128, 192)
    results = []
    for kind in ('Float32RoIExtractor', 'SingleRoIExtractor'):
        leaves = [m.clone().requires_grad_() for m in maps]
        out = build(kind, roi_layer=layer, finest_scale=8)(leaves, rois, factor)
        results.append((out, torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results)
    assert all(grad.any() for grad in results[0][1])  # each level had regions


def test_one_level_and_no_regions() -> None:
    maps = pyramid(128, 192)[:1]
    extractor = build('Float32RoIExtractor', featmap_strides=[4])
    rois = regions(6, high=64)
    expected = build('SingleRoIExtractor', featmap_strides=[4])(maps, rois)
    torch.testing.assert_close(extractor(maps, rois), expected)
    assert extractor(maps, rois[:0]).shape == (0, 4, 7, 7)


def largest_error(kind: str) -> float:
    """Of bins' centres, in pixels: each pixel of the maps holds its own x, from 1024 on, over 8."""
    width, height = 1344, 64
    ends = (torch.rand(200, 2) * 500 + 750).sort(1).values  # bfloat16 has steps of 4 or 8 here
    left, right = ends[:, 0], ends[:, 1] + 16
    rois = torch.stack([left * 0, left, left * 0, right, left * 0 + height], 1)
    maps = []
    for stride in SETTINGS['featmap_strides']:
        x = (torch.arange(width / stride) + 0.5) * stride - 1024
        maps.append((x / 8).expand(1, 4, height // stride, -1).bfloat16())
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=2)
    bins = build(kind, roi_layer=layer)(maps, rois)[:, 0, 3].float() * 8 + 1024
    centres = left[:, None] + (right - left)[:, None] * (torch.arange(7) + 0.5) / 7
    return (bins - centres).abs().max().item()


def test_boxes_stay_in_float32_under_mixed_precision() -> None:
    """What is left is the rounding of the features, 1 pixel here; mmdet adds that of the boxes."""
    assert largest_error('Float32RoIExtractor') <= 1.01
    assert largest_error('SingleRoIExtractor') > 2


def test_compiled_operators_get_maps_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmcv's kernels take maps and boxes of one type."""
    seen = []

    class Layer(nn.Module):
        output_size = (7, 7)

        def forward(self, maps: Tensor, rois: Tensor) -> Tensor:
            seen.append((maps.dtype, rois.dtype))
            return maps.new_zeros(len(rois), 4, 7, 7)

    extractor = build('Float32RoIExtractor')
    extractor.roi_layers = nn.ModuleList(Layer() for _ in range(4))
    monkeypatch.setattr(mmcv_ext, 'stands_in', lambda: False)
    out = extractor(pyramid(128, 192, torch.bfloat16), regions(6, high=64))
    assert out.dtype == torch.bfloat16
    assert set(seen) == {(torch.float32, torch.float32)}


def test_types_are_found_from_mmengine_and_mmdet() -> None:
    import mmvig.models.rcnn

    extractor = MODELS.build({'type': 'Float32RoIExtractor', **SETTINGS})
    assert type(extractor) is mmvig.models.rcnn.Float32RoIExtractor
    with pytest.raises(AttributeError, match="no attribute 'RoIExtractor'"):
        _ = mmvig.models.rcnn.RoIExtractor
