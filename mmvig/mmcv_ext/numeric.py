"""Pieces that several operators share: the computing precision, and gradients by autograd."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float64 if any of them is, else in float32: what every operator computes in.

    Half precision is widened for two reasons: coordinates lose pixels in it, and torchvision's
    kernels do not cover it on every device. Storing a result with `copy_` rounds it once.
    """
    is_double = any(t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if is_double else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def vjp(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of `(function(*inputs) * grad_output).sum()` with respect to every input."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        output = function(*leaves)
    grad_output = grad_output.to(output.dtype)
    return torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)
