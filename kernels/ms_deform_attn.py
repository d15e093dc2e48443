"""Multi-scale deformable attention: checks, autograd, dispatch.

`torch.ops.mmvig.ms_deform_attn` is the operator for compiled code. Eager code takes the same
kernels through an autograd function, which spares the host a third of its time, or, where there is
no kernel, `reference` itself, which is differentiable any number of times.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmvig.kernels import ms_deform_attn_plain, reference
from mmvig.kernels.dispatch import DTYPES, run, stands_in, working_dtype

MAX_HEAD_DIM = 256


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159, equation 3).

    Every query of a head is the weighted sum of bilinear samples of that head's value maps; samples
    outside a map are 0, and pixel centres lie at half-integers (`align_corners=False`).

    On CUDA a fused Triton operator, differentiable once, computes in float32 and rounds each result
    once; the gradient to value is summed in an order that may change from run to run unless
    `torch.use_deterministic_algorithms` is set. Elsewhere, for head dims over 256 and for float64,
    plain PyTorch computes the same. Under autocast value is cast to its dtype; locations and
    weights keep theirs: a location in bfloat16 is off by up to a third of a pixel on a map of 168.

    Args:
        value: (B, S, H, D), the maps of all levels, flattened row-major and concatenated; any
            strides, no copy where the last dim is contiguous.
        spatial_shapes: (L, 2), integers, (height, width) of each level; 0 for an empty one.
        level_start_index: (L,), integers, where each level starts in S.
        sampling_locations: (B, Q, H, L, P, 2), (x, y), 0 to 1 across a map; in the dtype of value
            or float32.
        attention_weights: (B, Q, H, L, P), likewise.

    Returns:
        (B, Q, H * D), contiguous, in the dtype of value.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together. Whether the levels fit into S
            is not checked on CUDA, where that would wait for the device: one that does not counts
            as empty.
    """
    value = value.to(working_dtype(value))
    args = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    _check(*args)
    if torch.compiler.is_compiling() or (value.is_cuda and stands_in(value)):
        return torch.ops.mmvig.ms_deform_attn(*args)
    if not _has_kernel(value, sampling_locations):
        return _plain(*args)
    return run(_Eager, _launch, *args)


def _check(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if value.ndim != 4:
        raise ValueError(f'value must be (B, S, H, D), got {tuple(value.shape)}')
    if locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f'sampling_locations must be (B, Q, H, L, P, 2), got {tuple(locations.shape)}'
        )
    if (locations.shape[0], locations.shape[2]) != (value.shape[0], value.shape[2]):
        raise ValueError(
            f'sampling_locations {tuple(locations.shape)} must share B and H with value '
            f'{tuple(value.shape)}'
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f'attention_weights {tuple(weights.shape)} must be sampling_locations '
            f'{tuple(locations.shape)} without its last dim'
        )
    levels = locations.shape[3]
    if shapes.shape != (levels, 2) or starts.shape != (levels,):
        raise ValueError(
            f'spatial_shapes {tuple(shapes.shape)} and level_start_index {tuple(starts.shape)} '
            f'must be ({levels}, 2) and ({levels},) for sampling_locations '
            f'{tuple(locations.shape)}'
        )
    _check_types(value, shapes, starts, locations, weights)


def _check_types(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> None:
    """Raises ValueError for dtypes and devices that do not fit together."""
    for name, x in (('spatial_shapes', shapes), ('level_start_index', starts)):
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f'{name} must be of dtype int32 or int64, got {x.dtype}')
    if not value.is_floating_point():
        raise ValueError(f'value must be of a floating dtype, got {value.dtype}')
    if locations.dtype != weights.dtype or locations.dtype not in (value.dtype, torch.float32):
        raise ValueError(
            f'sampling_locations ({locations.dtype}) and attention_weights ({weights.dtype}) must '
            f'both have the dtype of value ({value.dtype}) or torch.float32'
        )
    names = ('spatial_shapes', 'level_start_index', 'sampling_locations', 'attention_weights')
    for name, x in zip(names, (shapes, starts, locations, weights), strict=True):
        if x.device != value.device:
            raise ValueError(f'{name} is on {x.device}, value on {value.device}')


def _plain(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """The definition; for nothing to sample from or for, zeros that still carry gradients."""
    if value.numel() and locations.numel():
        return reference.ms_deform_attn(value, shapes, starts, locations, weights)
    nothing = value.sum() + locations.sum() + weights.sum()
    b, q, h = locations.shape[:3]
    return value.new_zeros(b, q, h * value.shape[-1]) + nothing.to(value.dtype) * 0


def _has_kernel(value: Tensor, locations: Tensor) -> bool:
    """Whether the Triton kernels cover these arguments; they number samples with int32."""
    if not value.is_cuda or value.dtype not in DTYPES or value.shape[-1] > MAX_HEAD_DIM:
        return False
    samples = locations.numel()
    return value.numel() > 0 and samples > 0 and samples // locations.shape[0] < 2**32


def _launch(*args: Tensor) -> Tensor:
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.ms_deform_attn_fwd import forward

    return forward(*args)


def _launch_backward(*args: Tensor | bool) -> tuple[Tensor, Tensor, Tensor]:
    from mmvig.kernels.ms_deform_attn_bwd import backward

    return backward(*args, torch.are_deterministic_algorithms_enabled())


@torch.library.custom_op('mmvig::ms_deform_attn', mutates_args=())
def _forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    launch = _launch if _has_kernel(value, locations) else _plain
    return launch(value, shapes, starts, locations, weights)


@_forward.register_fake
def _(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    b, q, h = locations.shape[:3]
    return value.new_empty(b, q, h * value.shape[-1])


@torch.library.custom_op('mmvig::ms_deform_attn_backward', mutates_args=())
def _backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad: Tensor,
    needs_value: bool,
    needs_points: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to value, locations and weights; those not needed are empty."""
    if _has_kernel(value, locations):
        return _launch_backward(
            value, shapes, starts, locations, weights, grad, needs_value, needs_points
        )
    needs = (needs_value, needs_points, needs_points)
    if value.numel() and locations.numel():
        grads = ms_deform_attn_plain.backward(value, shapes, starts, locations, weights, grad)
    else:
        grads = tuple(torch.zeros_like(x) for x in (value, locations, weights))
    return tuple(
        g.contiguous() if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True)
    )


@_backward.register_fake
def _(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad: Tensor,
    needs_value: bool,
    needs_points: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = ((value, needs_value), (locations, needs_points), (weights, needs_points))
    return tuple(x.new_empty(x.shape if need else 0) for x, need in needs)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    return _gradients(torch.ops.mmvig.ms_deform_attn_backward, ctx, grad)


def _gradients(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ctx: torch.autograd.function.FunctionCtx,
    grad: Tensor,
) -> tuple:
    needs_value, _, _, *needs_points = ctx.needs_input_grad
    value, *points = backward(*ctx.saved_tensors, grad, needs_value, any(needs_points))
    points = [x if need else None for x, need in zip(points, needs_points, strict=True)]
    return value if needs_value else None, None, None, *points


def _refuse(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> None:
    raise RuntimeError(
        'ms_deform_attn is differentiable once on CUDA and under torch.compile; for second '
        'derivatives call mmvig.kernels.reference.ms_deform_attn, which is plain PyTorch'
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The kernels without the dispatcher, on the GPU."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: Tensor) -> Tensor:
        out = _launch(*args)
        _save(ctx, args, out)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        if torch.is_grad_enabled():  # with a graph of its own, at whose end the operator refuses
            return _differentiate(ctx, grad)
        return _gradients(_launch_backward, ctx, grad)
