"""A linear with SwiGLU behind it, in inference one kernel: checks, dispatch."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels.dispatch import HALVES, as_rows, check_devices, form
from mmvig.kernels.swiglu import swiglu


def swiglu_product(x: Tensor, weight: Tensor) -> Tensor:
    """`swiglu(x @ weight^T)` (arXiv 2002.05202, equation 6).

    On GPUs from Hopper on in half precision, without gradients, outside `torch.compile`, one
    kernel: the product, twice as wide as the result, is not written. Elsewhere two.

    Args:
        x: (..., C).
        weight: (2 F, C), in the dtype of x.

    Returns:
        (..., F), contiguous, in the dtype of x.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f'x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (..., C) and (2 F, C)'
        )
    if x.dtype != weight.dtype:
        raise ValueError(f'x ({x.dtype}) and weight ({weight.dtype}) must share a dtype')
    check_devices(x, weight=weight)
    if not _has_kernel(x):
        return swiglu(F.linear(x, weight))
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.swiglu_product_kernels import forward

    return forward(as_rows(x), weight.contiguous()).view(*x.shape[:-1], -1)


def _has_kernel(x: Tensor) -> bool:
    half = x.dtype in HALVES
    return half and form(x) == 'eager' and not torch.is_grad_enabled() and _is_fast(x.device)


@lru_cache
def _is_fast(device: torch.device) -> bool:
    """Whether the kernel was measured on such a device."""
    return device.type == 'cpu' or torch.cuda.get_device_capability(device)[0] >= 9
