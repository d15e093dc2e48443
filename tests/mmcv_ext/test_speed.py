"""On a GPU, the hot operators cost what torchvision's raw ones do.

`pytest -m gpu -s tests/mmcv_ext/test_speed.py` prints the times. Nothing else may use the GPU.
"""

import os
from collections.abc import Callable

import mmcv._ext as ext
import pytest
import torch
from mmcv.ops import roi_align
from torchvision.ops import nms as _loads_torchvisions_operators  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        'PYTEST_XDIST_WORKER' in os.environ, reason='times are measured alone, without xdist'
    ),
]
RAW = torch.ops.torchvision


def _compare(name: str, ours: Callable, raw: Callable) -> None:
    from triton.testing import do_bench

    times = [do_bench(f, return_mode='median') for f in (ours, raw)]
    print(f'\n{name}: {times[0]:.3f} ms, torchvision {times[1]:.3f} ms', end=' ')
    assert times[0] <= 1.1 * times[1], name


def _boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2, device='cuda') * torch.tensor([1300.0, 780.0], device='cuda')
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, device='cuda') * 200], 1)


@pytest.mark.parametrize('count', [1000, 5000, 20000])
def test_nms(count: int) -> None:
    boxes, scores = _boxes(count), torch.rand(count, device='cuda')
    _compare(
        f'nms, {count} boxes',
        lambda: ext.nms(boxes, scores, iou_threshold=0.7, offset=0),
        lambda: RAW.nms(boxes, scores, 0.7),
    )


@pytest.mark.parametrize('rois, bins', [(1024, 7), (256, 14)])
def test_roi_align(rois: int, bins: int) -> None:
    """Mask R-CNN's heads on the stride-4 map of two 1344 x 800 images, forward and backward."""
    maps = torch.randn(2, 256, 200, 336, device='cuda', requires_grad=True)
    image = torch.randint(0, 2, (rois, 1), device='cuda').float()
    regions = torch.cat([image, _boxes(rois)], 1)
    args = (0.25, bins, bins)
    _compare(
        f'roi_align forward, {rois} regions, {bins}x{bins}',
        lambda: roi_align(maps.detach(), regions, bins, 0.25, 0, 'avg', True),
        lambda: RAW.roi_align(maps.detach(), regions, *args, 0, True),
    )
    out = roi_align(maps, regions, bins, 0.25, 0, 'avg', True)
    grad = torch.randn_like(out)
    _compare(
        'backward',
        lambda: torch.autograd.grad(out, maps, grad, retain_graph=True),
        lambda: RAW._roi_align_backward(grad, regions, *args, *maps.shape, 0, True),
    )
