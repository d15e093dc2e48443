"""Which form of an operator a call takes; shared by all operators.

Each has three: plain PyTorch; a registered operator, which `torch.compile`, `torch.export` and
tensors without memory see as a whole; and an autograd function for eager calls on a GPU, which
launches the same kernels but saves the dispatcher's 13 microseconds forward and 40 backward. Small
images are bound by the host's time, so that counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

Outputs = Tensor | tuple[Tensor, ...]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)


def form(x: Tensor, *others: Tensor | None) -> str:
    """'plain', 'registered' or 'eager', by the device and dtypes of the tensors."""
    if not x.is_cuda or x.numel() == 0 or x.dtype not in DTYPES:
        return 'plain'
    for t in others:
        if t is not None and t.dtype not in DTYPES:
            return 'plain'
    return 'registered' if torch.compiler.is_compiling() or stands_in(x) else 'eager'


def run(function: type[Function], launch: Callable[..., Outputs], *args: object) -> Outputs:
    """An eager call: the autograd function if gradients may be wanted, else what it launches.

    The function alone takes the host as long as the launch.
    """
    return function.apply(*args) if torch.is_grad_enabled() else launch(*args)


def stands_in(x: Tensor) -> bool:
    """Whether x is of a type whose tensors stand for others, as those of `torch.export` do."""
    return type(x) not in (Tensor, nn.Parameter)


def working_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where that is on, else the tensor's."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def as_rows(x: Tensor) -> Tensor:
    """(..., C) to (M, C) with a stride of 1 in C, without a copy where that can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def as_pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H, W, C), every image contiguous, without a copy where that can be."""
    x = x.permute(0, 2, 3, 1)
    _, _, width, c = x.shape
    return x if x.stride()[1:] == (width * c, c, 1) else x.contiguous()


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError for floating-point tensors of another device than x, or of other types."""
    if not x.is_floating_point():
        raise ValueError(f'expected a floating dtype, got {x.dtype}')
    for name, t in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f'{name} is on {t.device}, expected {x.device}')
        if not t.is_floating_point():
            raise ValueError(f'{name} must be of a floating dtype, got {t.dtype}')


def refuse_second_derivative(name: str) -> None:
    """Raises: the kernels' gradients have none of their own."""
    raise RuntimeError(
        f'{name} is differentiable once on CUDA; for second derivatives call '
        f'mmvig.kernels.reference.{name}, which is plain PyTorch'
    )
