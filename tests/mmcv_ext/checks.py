"""Comparison of an operator with its float64 reference: output and every gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest error as a share of the reference's largest value. Half precision: operators compute in
# float32 on the same rounded inputs and round their result once, so one unit in the last place.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
DTYPES = list(TOLERANCE)


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape, f'{name}: {tuple(got.shape)}, {tuple(expected.shape)}'
    error = (got.detach().double().cpu() - expected.detach()).abs().max()
    scale = expected.detach().abs().max().clamp(min=1e-3)
    assert error <= tolerance * scale, f'{name}: off by {error / scale:.2g} of its largest value'


def check(
    operator: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    device: str,
    tolerance: float | None = None,
) -> None:
    """Runs both on the same rounded inputs, compares outputs and gradients of all inputs."""
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    ours = [t.to(device, dtype).requires_grad_() for t in inputs]
    theirs = [t.detach().cpu().double().requires_grad_() for t in ours]
    got, expected = operator(*ours), reference(*theirs)
    assert got.dtype == dtype
    assert_close('output', got, expected, tolerance)
    grad = torch.randn(expected.shape).to(dtype)
    our_grads = torch.autograd.grad(got, ours, grad.to(device))
    their_grads = torch.autograd.grad(expected, theirs, grad.double())
    for index, (ours_, theirs_) in enumerate(zip(our_grads, their_grads, strict=True)):
        assert ours_.dtype == dtype
        assert_close(f'gradient of input {index}', ours_, theirs_, tolerance)
