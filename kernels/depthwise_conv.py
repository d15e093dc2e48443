"""Depthwise 3x3 conv on tokens, with an activation: checks, autograd, dispatch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import check_devices, form, refuse_second_derivative, run, working_dtype

ACTIVATIONS = ('none', 'silu', 'gelu')
MAX_MAPS = 3
# A map with more numbers goes to PyTorch's conv: cuDNN's is faster, here by up to two times with
# the backward, once the device is busy. Below that launches count, of which it needs more.
MAX_NUMBERS = 2**23


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    shapes: list[tuple[int, int]],
    bias: Tensor | None = None,
    act: str = 'none',
) -> Tensor:
    """Depthwise 3x3 conv with padding 1 on the tokens of maps, one after another; an activation.

    On CUDA, for up to three maps, one kernel forward and two backward for all maps together,
    differentiable once, float32 inside, no change of layout; only the inputs are saved. Sums over
    tokens, in the gradients of weight and bias, have a fixed order. One map of more than 8 million
    numbers takes PyTorch's conv in the dtype of x. Under autocast x is cast to its dtype.

    Args:
        x: (B, S, C), S tokens of maps of the given (height, width), row-major, concatenated.
        weight: (C, 1, 3, 3).
        shapes: (height, width) of each map.
        bias: (C,) or None.
        act: 'none', 'silu' or 'gelu' (the exact one).

    Returns:
        (B, S, C), in the dtype of x.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, for an unknown activation.
    """
    _check(x, weight, shapes, bias, act)
    x = x.to(working_dtype(x))
    way = form(x, weight)
    if way == 'plain' or len(shapes) > MAX_MAPS:
        return reference.depthwise_conv(x, weight, shapes, bias, act)
    x = x.contiguous()
    sizes = [n for hw in shapes for n in hw]
    if way == 'eager':
        return run(_Eager, launch, x, weight, bias, sizes, act)
    return torch.ops.mmvig.depthwise_conv(x, weight, bias, sizes, act)


def _check(
    x: Tensor, weight: Tensor, shapes: list[tuple[int, int]], bias: Tensor | None, act: str
) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if x.ndim != 3:
        raise ValueError(f'x must be (B, S, C), got {tuple(x.shape)}')
    c = x.shape[2]
    if weight.shape != (c, 1, 3, 3):
        raise ValueError(f'weight must be ({c}, 1, 3, 3) for x {tuple(x.shape)}, got '
                         f'{tuple(weight.shape)}')  # fmt: skip
    if bias is not None and bias.shape != (c,):
        raise ValueError(f'bias must be ({c},), the channels of x, got {tuple(bias.shape)}')
    if sum(h * w for h, w in shapes) != x.shape[1]:
        raise ValueError(f'maps of {list(shapes)} do not have the {x.shape[1]} tokens of x')
    if act not in ACTIVATIONS:
        raise ValueError(f'act must be one of {", ".join(ACTIVATIONS)}, got {act!r}')
    check_devices(x, weight=weight, bias=bias)


def _pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _is_large(x: Tensor, sizes: list[int]) -> bool:
    return len(sizes) == 2 and x.numel() > MAX_NUMBERS


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], act: str) -> Tensor:
    """The forward on a GPU, of contiguous x; sizes are heights and widths in turn."""
    if _is_large(x, sizes):
        maps = _convolve(x, weight, bias, sizes)
        maps = {'none': lambda t: t, 'silu': F.silu, 'gelu': F.gelu}[act](maps)
        return maps.flatten(2).transpose(1, 2).contiguous()
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.depthwise_conv_kernels import convolve

    return convolve(x, weight.contiguous(), bias, _pairs(sizes), act)


def launch_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    sizes: list[int],
    act: str,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients to x, and shares (P, C, 10) of those to weight and bias, float32."""
    if _is_large(x, sizes):
        return _differentiate_large(x, weight, bias, grad, sizes, act, needs_x)
    from mmvig.kernels.depthwise_conv_kernels import backward

    args = (x, weight.contiguous(), bias, grad.contiguous(), _pairs(sizes), act, needs_x)
    return backward(*args)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """PyTorch's conv of one map, (B, C, h, w), channels last in memory as the tokens are."""
    maps = x.unflatten(1, sizes).permute(0, 3, 1, 2)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(maps, weight.to(x.dtype), bias, padding=1, groups=x.shape[2])


def _differentiate_large(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    sizes: list[int],
    act: str,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """As `launch_backward`, by PyTorch's operators."""
    aten = torch.ops.aten
    grad = grad.unflatten(1, sizes).permute(0, 3, 1, 2)
    if act != 'none':
        before = _convolve(x, weight, bias, sizes)
        backward = {'silu': aten.silu_backward, 'gelu': aten.gelu_backward}[act]
        grad = backward(grad, before)
    maps = x.unflatten(1, sizes).permute(0, 3, 1, 2)
    dx, dweight, _ = aten.convolution_backward(
        grad, maps, weight.to(x.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], x.shape[2],
        [needs_x, True, False],
    )  # fmt: skip
    dx = dx.flatten(2).transpose(1, 2).contiguous() if needs_x else None
    dbias = grad.sum((0, 2, 3), dtype=torch.float32) if bias is not None else grad.new_zeros(1)
    dbias = dbias.float().expand(x.shape[2])[:, None]
    return dx, torch.cat([dweight.flatten(1).float(), dbias], 1)[None]


def _sum(share: Tensor) -> Tensor:
    from mmvig.kernels.shares import sum_shares

    return sum_shares(share)[0]


def _split(sums: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(C, 10) to gradients of weight and bias."""
    weight = sums[:, :9].reshape(-1, 1, 3, 3)
    return weight, (sums[:, 9] if has_bias else None)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: list[int],
        act: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.settings = (sizes, act)
        return launch(x, weight, bias, sizes, act)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        x, weight, bias = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        dx, share = launch_backward(x, weight, bias, grad, *ctx.settings, needs_x)
        return dx, *_split(_sum(share), bias is not None), None, None


@torch.library.custom_op('mmvig::depthwise_conv', mutates_args=(), device_types='cuda')
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], act: str) -> Tensor:
    return launch(x, weight, bias, sizes, act)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], act: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op('mmvig::depthwise_conv_backward', mutates_args=(), device_types='cuda')
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, sizes: list[int], act: str
) -> tuple[Tensor, Tensor]:
    dx, share = launch_backward(x, weight, bias, grad, sizes, act, True)
    return dx, _sum(share)


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, sizes: list[int], act: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[2], 10, dtype=torch.float32)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    dx, sums = torch.ops.mmvig.depthwise_conv_backward(x, weight, bias, grad, *ctx.settings)
    return dx, *_split(sums, bias is not None), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(lambda ctx, *grads: refuse_second_derivative('depthwise_conv'))
