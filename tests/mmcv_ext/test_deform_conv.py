import pytest
import torch
from mmcv.ops import DeformConv2dPack, deform_conv2d, modulated_deform_conv2d

from . import reference
from .checks import DTYPES, check

GEOMETRIES = [
    dict(stride=1, padding=1, dilation=1, groups=1, deform_groups=1),
    dict(stride=2, padding=2, dilation=2, groups=2, deform_groups=2),
]


def _inputs(geometry: dict, kernel: tuple[int, int] = (3, 2)) -> list[torch.Tensor]:
    """Image, offset, mask, weight, bias."""
    image = torch.randn(2, 2, 4, 5)
    reach = [geometry['dilation'] * (k - 1) + 1 for k in kernel]
    out = [
        (n + 2 * geometry['padding'] - r) // geometry['stride'] + 1
        for n, r in zip((4, 5), reach, strict=True)
    ]
    taps = geometry['deform_groups'] * kernel[0] * kernel[1]
    # Offsets keep away from integers, where bilinear sampling has no derivative.
    offset = torch.randint(-2, 3, (2, 2 * taps, *out)) + 0.125 + 0.75 * torch.rand(1)
    weight = torch.randn(4, 2 // geometry['groups'], *kernel)
    return [image, offset, torch.rand(2, taps, *out), weight, torch.randn(4)]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_deform_conv(geometry: dict, dtype: torch.dtype, device: str) -> None:
    image, offset, _, weight, _ = _inputs(geometry)

    def op(image: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return deform_conv2d(image, offset, weight, *geometry.values())

    def formula(image: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.deform_conv(image, offset, weight, **geometry)

    check(op, formula, [image, offset, weight], dtype, device)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('with_bias', [True, False])
def test_modulated_deform_conv(
    with_bias: bool, geometry: dict, dtype: torch.dtype, device: str
) -> None:
    inputs = _inputs(geometry)
    if not with_bias:
        inputs.pop()

    def op(*tensors: torch.Tensor) -> torch.Tensor:
        bias = tensors[4] if with_bias else None
        return modulated_deform_conv2d(*tensors[:4], bias, *geometry.values())

    def formula(*tensors: torch.Tensor) -> torch.Tensor:
        image, offset, mask, weight = tensors[:4]
        bias = tensors[4] if with_bias else None
        return reference.deform_conv(image, offset, weight, mask, bias, **geometry)

    check(op, formula, inputs, dtype, device)


def test_larger_offsets_are_read_from_their_start(device: str) -> None:
    """As mmcv's kernel reads them; mmdet's DyHead was trained on it."""
    image, offset, mask, weight, _ = _inputs(GEOMETRIES[0])
    size = offset.shape[2:]
    large = [torch.cat([t, t + 0.125], 3) for t in (offset, mask)]  # twice as wide

    def op(*tensors: torch.Tensor) -> torch.Tensor:
        return modulated_deform_conv2d(*tensors, None, 1, 1)

    def formula(
        image: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        values = [t.flatten(1)[:, : t.shape[1] * size.numel()] for t in (offset, mask)]
        offset, mask = (t.unflatten(1, (-1, *size)) for t in values)
        return reference.deform_conv(image, offset, weight, mask, padding=1)

    check(op, formula, [image, *large, weight], torch.float32, device)
    with pytest.raises(
        ValueError, match=r'at least as large as the output, \(4, 6\), got \(4, 5\)'
    ):
        op(image.to(device), *(t[..., :5].to(device) for t in (offset, mask)), weight.to(device))


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
def test_offsets_that_are_no_numbers_lie_outside(bad: float, device: str) -> None:
    image, offset, _, weight, _ = (t.to(device) for t in _inputs(GEOMETRIES[0]))
    results = []
    for value in (bad, 1e4):
        moved = offset.clone()
        moved[:, ::3] = value
        leaves = [t.detach().requires_grad_() for t in (image, moved, weight)]
        out = deform_conv2d(*leaves, 1, 1)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_weight_gradient_alone_and_repeated() -> None:
    """The weight's gradient also comes without the input's, and not twice from one scratch."""
    image, offset, _, weight, _ = _inputs(GEOMETRIES[0])
    weight.requires_grad_()
    alone = torch.autograd.grad(deform_conv2d(image, offset, weight, 1, 1).sum(), weight)[0]
    image.requires_grad_()
    out = deform_conv2d(image, offset, weight, 1, 1)
    first = torch.autograd.grad(out.sum(), (image, weight), retain_graph=True)[1]
    second = torch.autograd.grad((2 * out).sum(), (image, weight), retain_graph=True)[1]
    only = torch.autograd.grad((3 * out).sum(), weight)[0]
    for factor, grad in ((1, first), (2, second), (3, only)):
        torch.testing.assert_close(grad, factor * alone)


def test_mixed_precision_layer() -> None:
    """Under autocast the offsets come in bf16 and mmcv casts the rest to them."""
    layer = DeformConv2dPack(3, 4, 3, padding=1)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(torch.randn(2, 3, 6, 6))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()
