"""A sum of maps, one of them resized, and the batch norm after it: checks, autograd, dispatch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import as_pixels, check_devices, form, refuse_second_derivative, run

Norm = tuple[Tensor, Tensor, Tensor, Tensor]
NO_NORM = (None, None, None, None)
RATIOS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2))  # sizes of the sum to sizes of the tokens' map


def resized_sum(
    x: Tensor,
    tokens: Tensor,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`x + y + bias + resize(tokens)`, bilinear, and on request batch norm by given statistics.

    Resizing is `F.interpolate(mode='bilinear', align_corners=False)`. On CUDA, where sides are
    those of the tokens' map or 2, 4 or 8 times as long or half as long, one kernel forward and one
    backward, in which every token gathers its gradient, differentiable once, float32 inside; the
    gradients to x and y are that of the sum itself, and nothing is saved. With a norm that is so
    without gradients; with them PyTorch's batch norm follows.

    Args:
        x: (B, C, H, W), channels last in memory, else it is copied.
        tokens: (B, C, h, w), likewise; may be of a wider dtype.
        y: (B, C, H, W), likewise, in the dtype of x; or None.
        bias: (C,) or None.
        norm: Running mean, running variance, weight and bias of batch norm, (C,) each; or None.
        eps: Added to the variance.

    Returns:
        (B, C, H, W) in the dtype of x, channels last in memory.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    _check(x, tokens, y, bias, norm)
    ratio = resize_ratio(x.shape, tokens.shape)
    way = form(x, tokens, bias, *(norm or ()))
    if way == 'plain' or ratio is None:
        return reference.resized_sum(x, tokens, y, bias, norm, eps)
    later = norm if norm is not None and torch.is_grad_enabled() else None
    x, tokens, y = (None if t is None else as_pixels(t) for t in (x, tokens, y))
    args = (x, tokens, y, bias, *(NO_NORM if norm is None or later else norm), eps, *ratio)
    is_eager = way == 'eager'
    out = run(_Eager, _launch, *args) if is_eager else torch.ops.mmvig.resized_sum(*args)
    out = out.permute(0, 3, 1, 2)
    if later is None:
        return out
    mean, var, weight, shift = later
    return F.batch_norm(out, mean, var, weight, shift, False, 0.0, eps)


def _check(
    x: Tensor, tokens: Tensor, y: Tensor | None, bias: Tensor | None, norm: Norm | None
) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if x.ndim != 4 or tokens.ndim != 4 or tokens.shape[:2] != x.shape[:2]:
        raise ValueError(
            f'x {tuple(x.shape)} and tokens {tuple(tokens.shape)} must be (B, C, H, W) and '
            '(B, C, h, w)'
        )
    if y is not None and (y.shape != x.shape or y.dtype != x.dtype):
        raise ValueError(
            f'y {tuple(y.shape)} of {y.dtype} must be as x, {tuple(x.shape)} of {x.dtype}'
        )
    names = ('bias', 'mean', 'variance', 'weight', 'shift')
    params = dict(zip(names, (bias, *(norm or NO_NORM)), strict=True))
    for name, p in params.items():
        if p is not None and p.shape != (x.shape[1],):
            raise ValueError(f'{name} must be ({x.shape[1]},), the channels, got {tuple(p.shape)}')
    check_devices(x, tokens=tokens, y=y, **params)


def resize_ratio(large: torch.Size, small: torch.Size) -> tuple[int, int] | None:
    """How many times as long the sides (B, C, H, W) are; None for what the kernels do not have."""
    (height, width), (h, w) = large[2:], small[2:]
    for up, down in RATIOS:
        if height * down == h * up and width * down == w * up:
            return up, down
    return None


def _launch(*args: Tensor | float | None) -> Tensor:
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.resized_sum_kernels import forward

    x, tokens, y, bias, *norm, eps, up, down = args
    return forward(x, tokens, y, bias, norm, eps, (up, down))


def _launch_backward(
    grad: Tensor, h: int, w: int, dtype: torch.dtype, up: int, down: int, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients to tokens and bias."""
    from mmvig.kernels.resized_sum_kernels import backward

    return backward(grad, (h, w), dtype, (up, down), has_bias)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    tokens, (up, down) = inputs[1], inputs[-2:]
    ctx.settings = (*tokens.shape[1:3], tokens.dtype, up, down, inputs[3] is not None)
    ctx.has_y = inputs[2] is not None
    ctx.bias_dtype = None if inputs[3] is None else inputs[3].dtype


def _gradients(
    ctx: torch.autograd.function.FunctionCtx,
    grad: Tensor,
    dtokens: Tensor,
    dbias: Tensor | None,
) -> tuple:
    """In the order of the operator's arguments; the batch norm's have none."""
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return grad, dtokens, (grad if ctx.has_y else None), dbias, *NO_NORM, None, None, None


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: Tensor | float | None) -> Tensor:
        _save(ctx, args, None)
        return _launch(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        grad = grad.contiguous()
        return _gradients(ctx, grad, *_launch_backward(grad, *ctx.settings))


@torch.library.custom_op('mmvig::resized_sum', mutates_args=(), device_types='cuda')
def _forward(
    x: Tensor,
    tokens: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    up: int,
    down: int,
) -> Tensor:
    return _launch(x, tokens, y, bias, mean, var, weight, shift, eps, up, down)


@_forward.register_fake
def _(
    x: Tensor,
    tokens: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    up: int,
    down: int,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op('mmvig::resized_sum_backward', mutates_args=(), device_types='cuda')
def _backward(
    grad: Tensor, h: int, w: int, dtype: torch.dtype, up: int, down: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    dtokens, dbias = _launch_backward(grad.contiguous(), h, w, dtype, up, down, has_bias)
    return dtokens, (grad.new_empty(0) if dbias is None else dbias)


@_backward.register_fake
def _(
    grad: Tensor, h: int, w: int, dtype: torch.dtype, up: int, down: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    b, _, _, c = grad.shape
    dbias = grad.new_empty(c if has_bias else 0, dtype=torch.float32)
    return grad.new_empty(b, h, w, c, dtype=dtype), dbias


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    grads = torch.ops.mmvig.resized_sum_backward(grad, *ctx.settings)
    return _gradients(ctx, grad, *grads)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(lambda ctx, *grads: refuse_second_derivative('resized_sum'))
