"""An image as convs on a GPU want it, channels last and rounded: checks and dispatch."""

import torch
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import DTYPES, check_devices, form

MAX_CHANNELS = 4  # of more, PyTorch's copy writes whole lines of memory


def channels_last(x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """x in another dtype, channels last in memory; x itself where it is so already.

    On CUDA, for images of at most 4 channels, one plane after another, that want no gradient,
    outside `torch.compile` one kernel. PyTorch's copy takes twice as long as memory does.

    Args:
        x: (B, CIN, H, W).
        dtype: Of the result, floating.
        out: Where it is written, of x's shape and that dtype; not x.

    Returns:
        (B, CIN, H, W), channels last in memory; out, if that is given.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if x.ndim != 4 or not dtype.is_floating_point:
        raise ValueError(f'x {tuple(x.shape)} must be (B, CIN, H, W), and {dtype} floating')
    if out is not None and (out.shape != x.shape or out.dtype != dtype):
        raise ValueError(
            f'out must be {tuple(x.shape)} of {dtype}, got {tuple(out.shape)} of {out.dtype}'
        )
    check_devices(x, out=out)
    if dtype not in DTYPES or not _has_kernel(x, out):
        made = reference.channels_last(x, dtype)
        return made if out is None else out.copy_(made)
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.channels_last_kernels import launch

    if out is None:
        out = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    launch(x, out)
    return out


def _has_kernel(x: Tensor, out: Tensor | None) -> bool:
    if form(x, out) != 'eager' or (torch.is_grad_enabled() and x.requires_grad):
        return False
    channels, _, width = x.shape[1:]
    if not 2 <= channels <= MAX_CHANNELS or x.stride()[2:] != (width, 1):
        return False
    return out is None or out.stride()[1:] == (1, width * channels, channels)
