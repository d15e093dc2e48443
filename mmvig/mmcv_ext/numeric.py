"""Pieces that several operators share: the computing precision, and gradients by autograd."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling


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


def store(target: Tensor, result: Tensor) -> None:
    """Puts a fresh result into the tensor that mmcv allocated for it.

    mmcv makes that tensor for the call and holds no other view of it. So where nothing is to be
    converted, it takes over the result's memory: at RoIAlign's sizes the copy would be a tenth of
    the operator's time. A view, whose owner waits for the values, is copied into.
    """
    same = target.dtype == result.dtype and target.shape == result.shape
    if same and result.is_contiguous() and not target._is_view() and not is_compiling():
        target.set_(result)
    else:
        target.copy_(result)
