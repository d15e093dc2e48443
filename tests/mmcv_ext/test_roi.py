"""RoIAlign, RoIPool, deformable RoI pooling, rotated RoIAlign, border align."""

import mmcv._ext as ext
import pytest
import torch
from mmcv.ops import border_align, deform_roi_pool, roi_align, roi_align_rotated, roi_pool

from . import reference
from .checks import DTYPES, TOLERANCE, check

# Inside, across the borders, far outside, smaller than a pixel; exact in half precision.
ROIS = torch.tensor(
    [
        [0, 2.0, 3.0, 17.0, 13.0],
        [1, -5.0, -3.0, 9.0, 30.0],
        [1, 12.5, 9.0, 26.0, 21.25],
        [0, 60.0, 60.0, 80.0, 70.0],
        [1, 5.0, 5.0, 5.25, 5.5],
    ]
)
SIZE = (2, 3)


def _maps(channels: int = 2) -> torch.Tensor:
    return torch.randn(2, channels, 7, 9)


# Max pooling in half precision: see test_roi_align_max_half.
MODES = [('avg', dtype) for dtype in DTYPES] + [('max', torch.float64), ('max', torch.float32)]


@pytest.mark.parametrize('mode, dtype', MODES)
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('aligned', [True, False])
def test_roi_align(aligned: bool, ratio: int, mode: str, dtype: torch.dtype, device: str) -> None:
    def op(maps: torch.Tensor) -> torch.Tensor:
        return roi_align(maps, ROIS.to(maps), SIZE, 0.5, ratio, mode, aligned)

    def formula(maps: torch.Tensor) -> torch.Tensor:
        return reference.roi_align(maps, ROIS, SIZE, 0.5, ratio, mode, aligned)

    check(op, formula, [_maps()], dtype, device)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_max_half(dtype: torch.dtype, device: str) -> None:
    """Forward only: mmcv keeps the best points in the input's dtype, which moves the gradients."""
    maps = _maps().to(dtype)
    got = roi_align(maps.to(device), ROIS.to(device, dtype), SIZE, 0.5, 2, 'max', True)
    expected = reference.roi_align(maps.double(), ROIS, SIZE, 0.5, 2, 'max', True)
    assert (got.cpu().double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_of_a_diverged_model(mode: str, device: str) -> None:
    bad = torch.tensor([[0, torch.nan, 1.0, 6.0, 6.0], [0, 1.0, 1.0, torch.inf, -torch.inf]])
    zeroed = torch.tensor([[0, 0.0, 1.0, 6.0, 6.0], [0, 1.0, 1.0, 0.0, 0.0]])
    maps = _maps().to(device).requires_grad_()
    outs = [roi_align(maps, rois.to(device), 2, 1.0, 0, mode, False) for rois in (bad, zeroed)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), maps)[0] for out in outs))


@pytest.mark.gpu
@pytest.mark.parametrize('aligned', [True, False])
def test_roi_align_deterministic(aligned: bool) -> None:
    """torchvision's backward kernel refuses where PyTorch is asked to be deterministic."""
    maps, grad = _maps().cuda().requires_grad_(), torch.randn(len(ROIS), 2, *SIZE).cuda()
    grads = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            out = roi_align(maps, ROIS.cuda(), SIZE, 0.5, 0, 'avg', aligned)
            grads.append(torch.autograd.grad(out, maps, grad)[0])
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*grads)


def test_roi_align_float32_rois_stay_float32() -> None:
    """Coordinates are not rounded to the features' precision: at 1000 pixels bf16 knows 8 steps."""
    maps = torch.arange(2000.0).view(1, 1, 1, -1).expand(1, 1, 8, -1)
    rois = torch.tensor([[0, 1001.0, 0.0, 1003.0, 8.0]])
    got = roi_align(maps.bfloat16(), rois, (1, 1), 1.0, 2, 'avg', True)
    assert got.item() == maps[..., 1001:1003].bfloat16().float().mean().bfloat16().item()


def test_roi_align_under_autocast() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        out = roi_align(_maps().bfloat16(), ROIS.bfloat16(), SIZE, 0.5, 2, 'avg', True)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_no_rois(mode: str) -> None:
    maps = _maps().requires_grad_()
    out = roi_align(maps, torch.zeros(0, 5), SIZE, 0.5, 0, mode, True)
    assert out.shape == (0, 2, *SIZE)
    out.sum().backward()
    assert not maps.grad.any()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('scale', [0.5, 1.0, 0.3])
def test_roi_pool(scale: float, dtype: torch.dtype, device: str) -> None:
    def op(maps: torch.Tensor) -> torch.Tensor:
        return roi_pool(maps, ROIS.to(maps), SIZE, scale)

    def formula(maps: torch.Tensor) -> torch.Tensor:
        return reference.roi_pool(maps, ROIS, SIZE, scale)

    check(op, formula, [_distinct_maps()], dtype, device)


def _distinct_maps() -> torch.Tensor:
    """Integers, all different and exact in every dtype, so that every maximum is unique."""
    return torch.stack([torch.randperm(126)[:63] for _ in range(4)]).view(2, 2, 7, 9) * 1.0


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('ratio', [0, 2])
def test_deform_roi_pool(ratio: int, dtype: torch.dtype, device: str) -> None:
    rois = ROIS[:4]

    def op(maps: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return deform_roi_pool(maps, rois.to(maps), offset, SIZE, 0.5, ratio, 0.5)

    def formula(maps: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return reference.deform_roi_pool(maps, offset, rois, SIZE, 0.5, ratio, 0.5)

    check(op, formula, [_maps(), torch.randn(4, 2, *SIZE)], dtype, device)


def test_deform_roi_pool_without_offset_is_roi_align() -> None:
    maps = _maps().requires_grad_()
    out = deform_roi_pool(maps, ROIS, None, SIZE, 0.5, 2, 0.1)
    expected = reference.roi_align(maps, ROIS, SIZE, 0.5, 2, 'avg', True)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, maps, grad), torch.autograd.grad(expected, maps, grad)
    )


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('clockwise', [False, True])
@pytest.mark.parametrize('aligned, ratio', [(True, 2), (False, 0)])
def test_roi_align_rotated(
    aligned: bool, ratio: int, clockwise: bool, dtype: torch.dtype, device: str
) -> None:
    rois = torch.tensor(
        [
            [0, 8.0, 6.0, 10.0, 5.0, 0.5],
            [1, 3.0, 12.0, 14.0, 9.0, -1.25],
            [1, 15.0, 2.0, 1.0, 0.5, 3],
        ]
    )

    def op(maps: torch.Tensor) -> torch.Tensor:
        return roi_align_rotated(maps, rois.to(maps), SIZE, 0.5, ratio, aligned, clockwise)

    def formula(maps: torch.Tensor) -> torch.Tensor:
        return reference.roi_align_rotated(maps, rois, SIZE, 0.5, ratio, aligned, clockwise)

    check(op, formula, [_maps()], dtype, device)


@pytest.mark.parametrize('dtype', DTYPES)
def test_border_align(dtype: torch.dtype, device: str) -> None:
    boxes = torch.tensor([[1.0, 0.5, 6.0, 4.0], [-2.0, 3.0, 3.5, 9.5], [2.0, 2.0, 2.0, 5.0]])
    boxes = torch.stack([boxes, boxes.flip(0) + 0.25])

    def op(maps: torch.Tensor) -> torch.Tensor:
        return border_align(maps, boxes.to(maps), 4)

    def formula(maps: torch.Tensor) -> torch.Tensor:
        return reference.border_align(maps, boxes, 4)

    check(op, formula, [_maps(channels=8)], dtype, device)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions are worked off in parts, on large inputs only."""
    from mmvig.mmcv_ext import sampling

    maps, offset = _maps(8), torch.randn(len(ROIS), 2, *SIZE)
    boxes = torch.rand(2, 5, 4) * 6

    def everything() -> list[torch.Tensor]:
        leaf = maps.clone().requires_grad_()
        outputs = [
            roi_align(leaf, ROIS, SIZE, 0.5, 0, 'max', True),
            roi_pool(leaf, ROIS, SIZE, 0.5),
            deform_roi_pool(leaf, ROIS, offset, SIZE, 0.5, 0, 0.1),
            border_align(leaf, boxes, 3),
        ]
        return [*outputs, *(torch.autograd.grad(out.sum(), leaf)[0] for out in outputs)]

    whole = everything()
    monkeypatch.setattr(sampling, '_CHUNK_ELEMENTS', 1)
    for first, second in zip(whole, everything(), strict=True):
        torch.testing.assert_close(first, second)


def test_a_view_as_output_is_written_through() -> None:
    maps, whole = _maps(), torch.full((2, len(ROIS), 2, *SIZE), torch.nan)
    args = dict(aligned_height=2, aligned_width=3, spatial_scale=0.5, sampling_ratio=2)
    empty = torch.zeros(0)
    ext.roi_align_forward(maps, ROIS, whole[1], empty, empty, **args, pool_mode=1, aligned=True)
    torch.testing.assert_close(whole[1], roi_align(maps, ROIS, SIZE, 0.5, 2, 'avg', True))
    assert whole[0].isnan().all()
