"""CARAFE, PSA masks, masked convolution, box overlaps, synchronised batch normalisation."""

import mmcv._ext as ext
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import bbox_overlaps, carafe, carafe_naive, masked_conv2d
from mmcv.ops.psa_mask import psa_mask
from mmcv.ops.sync_bn import SyncBatchNormFunction

from . import reference
from .checks import DTYPES, TOLERANCE, assert_close, check


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kernel, groups, scale', [(3, 1, 2), (5, 2, 1), (1, 1, 3)])
def test_carafe(kernel: int, groups: int, scale: int, dtype: torch.dtype, device: str) -> None:
    features = torch.randn(2, 4, 3, 4)
    masks = torch.rand(2, groups * kernel * kernel, 3 * scale, 4 * scale)

    def op(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return carafe(features, masks, kernel, groups, scale)

    def formula(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return reference.carafe(features, masks, kernel, groups, scale)

    check(op, formula, [features, masks], dtype, device)


def test_carafe_naive() -> None:
    """mmcv's Python lets the naive form run backward on a GPU only, hence the direct call."""
    features = torch.randn(1, 2, 3, 3, requires_grad=True)
    masks = torch.rand(1, 9, 6, 6, requires_grad=True)
    out = carafe_naive(features, masks, 3, 1, 2)
    expected = reference.carafe(features, masks, 3, 1, 2)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(expected)
    grads = [torch.empty_like(features), torch.empty_like(masks)]
    ext.carafe_naive_backward(grad, features.detach(), masks.detach(), *grads, 3, 1, 2)
    for got, want in zip(
        grads, torch.autograd.grad(expected, (features, masks), grad), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('psa_type', [0, 1])
@pytest.mark.parametrize('size', [(3, 5), (5, 7)])
def test_psa_mask(size: tuple[int, int], psa_type: int, dtype: torch.dtype, device: str) -> None:
    def op(masks: torch.Tensor) -> torch.Tensor:
        return psa_mask(masks, psa_type, size)

    def formula(masks: torch.Tensor) -> torch.Tensor:
        return reference.psa_mask(masks, ['collect', 'distribute'][psa_type], size)

    check(op, formula, [torch.randn(2, size[0] * size[1], 3, 4)], dtype, device)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_masked_conv(dtype: torch.dtype, device: str) -> None:
    image, weight, bias = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    mask = torch.rand(1, 5, 6) > 0.5
    tensors = [t.to(device, dtype) for t in (image, weight, bias)]
    got = masked_conv2d(tensors[0], mask.to(device), *tensors[1:], 1)
    image, weight, bias = (t.double().cpu() for t in tensors)
    expected = F.conv2d(image, weight, bias, padding=1) * mask
    assert_close('output', got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('mode', ['iou', 'iof'])
@pytest.mark.parametrize('aligned', [True, False])
def test_bbox_overlaps(
    aligned: bool, mode: str, offset: int, dtype: torch.dtype, device: str
) -> None:
    corner, size = torch.rand(2, 6, 2) * 8, torch.rand(2, 6, 2) * 8 + 1
    first, second = torch.cat([corner, corner + size], 2).to(dtype)
    got = bbox_overlaps(first.to(device), second.to(device), mode, aligned, offset)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for i, a in enumerate(first.tolist()):
        for j, b in enumerate(second.tolist()):
            value = reference.iou(a, b, offset)
            if mode == 'iof':
                areas = [(x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (a, b)]
                value = value * sum(areas) / (1 + value) / areas[0]
            expected[i, j] = value
    assert_close('overlaps', got, expected.diag() if aligned else expected, TOLERANCE[dtype])


@pytest.mark.parametrize('stats_mode', ['default', 'N'])
def test_sync_bn(stats_mode: str, device: str) -> None:
    """One process: the same as batch normalisation, running statistics included."""
    theirs = torch.nn.BatchNorm2d(4, momentum=0.2, dtype=torch.float64)
    torch.nn.init.uniform_(theirs.weight)
    params = [p.detach().float().to(device).requires_grad_() for p in theirs.parameters()]
    running = [torch.zeros(4, device=device), torch.ones(4, device=device)]
    image = torch.randn(3, 4, 5, 6)
    inputs = [t.detach().requires_grad_() for t in (image.to(device, copy=True), image.double())]
    got = SyncBatchNormFunction.apply(
        inputs[0], *running, *params, 0.2, theirs.eps, None, 1, stats_mode
    )
    expected = theirs(inputs[1])
    grad = torch.randn(3, 4, 5, 6)
    got.backward(grad.to(device))
    expected.backward(grad.double())
    assert_close('output', got, expected, 1e-5)
    assert_close('input', inputs[0].grad, inputs[1].grad, 1e-5)
    for ours, parameter in zip(params, theirs.parameters(), strict=True):
        assert_close('parameter', ours.grad, parameter.grad, 1e-5)
    assert_close('running mean', running[0], theirs.running_mean, 1e-5)
    assert_close('running variance', running[1], theirs.running_var, 1e-5)
