"""Bidirectional gated linear attention: checks, autograd, dispatch.

`torch.ops.mmvig.bidirectional_gla` is the fused operator, in Triton for CUDA tensors. Eager code
takes the same kernels through an autograd function, which spares the host the dispatcher's time;
everything else takes `bigla_chunked`, the same function in plain PyTorch. Compiled code always has
the operator: the plain form recurses over the tokens, whose number a compiled graph leaves open.
"""

from functools import partial

import torch
from torch import Tensor

from mmvig.kernels import bigla_chunked
from mmvig.kernels.bigla_bwd_outputs import Into
from mmvig.kernels.dispatch import form, working_dtype

MAX_KEY_DIM = 128


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_fwd: Tensor,
    log_gate_bwd: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Bidirectional gated linear attention (arXiv 2405.18425, section 3.2), linear in N.

    Per head and direction: `S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t`, `o_t = scale * q_t S_t`;
    the backward direction runs from the last token to the first with its own gate, taken at
    token t. Both include the current token, and the result is the mean of the two.

    On CUDA one fused Triton operator computes both directions, differentiable once, with products
    of bfloat16 (TF32 for float16, three TF32 for float32) accumulated in float32; gates and states
    are float32 throughout, and any gate from 0 down is handled. Elsewhere, for key dims over 128
    or other dtypes, and where the kernel fails its self-check, plain PyTorch computes the same.
    Under autocast q, k and v are cast to its dtype; gates keep theirs.

    Args:
        q, k: (B, N, H, K), any strides; no copy where the last dim is contiguous.
        v: (B, N, H, V).
        log_gate_fwd, log_gate_bwd: (B, N, H, K), natural logarithms of the gates, at most 0; may
            be of another floating dtype than q.
        scale: Factor of q; `K ** -0.5` where None.

    Returns:
        (B, N, H, V), contiguous, in the dtype of q.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    _check(q, k, v, log_gate_fwd, log_gate_bwd)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = working_dtype(q)
    gates = (log_gate_fwd, log_gate_bwd)
    args = (q.to(dtype), k.to(dtype), v.to(dtype), *gates, scale)
    if torch.compiler.is_compiling() or form(*args[:5]) == 'registered':
        return torch.ops.mmvig.bidirectional_gla(*args)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in args[:5])
    if _has_trusted_kernel(args[0], args[2], *gates, gradients):
        return _Eager.apply(*args)
    return bigla_chunked.bidirectional_gla(*args)


def _check(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f'q and v must be (B, N, H, D), got {tuple(q.shape)}, {tuple(v.shape)}')
    for name, x in (('k', k), ('log_gate_fwd', gf), ('log_gate_bwd', gb)):
        if x.shape != q.shape:
            raise ValueError(f'{name} {tuple(x.shape)} must have the shape of q {tuple(q.shape)}')
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f'v {tuple(v.shape)} must share (B, N, H) with q {tuple(q.shape)}')
    autocast = torch.is_autocast_enabled(q.device.type)
    if not (autocast or q.dtype == k.dtype == v.dtype):
        raise ValueError(f'q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}')
    for name, x in (('k', k), ('v', v), ('log_gate_fwd', gf), ('log_gate_bwd', gb)):
        if not x.is_floating_point():
            raise ValueError(f'{name} must be of a floating dtype, got {x.dtype}')
        if x.device != q.device:
            raise ValueError(f'{name} is on {x.device}, q on {q.device}')


def _has_trusted_kernel(q: Tensor, v: Tensor, gf: Tensor, gb: Tensor, gradients: bool) -> bool:
    """Whether there is a kernel for these arguments, and it passed its self-check."""
    if form(q, gf, gb) == 'plain' or q.shape[-1] > MAX_KEY_DIM:
        return False
    # Imported here, as the kernels are, since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.bigla_trust import trusted

    return trusted(q.device, q.dtype, gf.dtype, q.shape[-1], v.shape[-1], gradients)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> Tensor:
    from mmvig.kernels.bigla_fwd import forward

    return forward(*(_unit_stride(x) for x in (q, k, v, gf, gb)), scale)


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    into: Into | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from mmvig.kernels.bigla_bwd import backward

    return backward(*(_unit_stride(x) for x in (q, k, v, gf, gb, do)), scale, into=into)


def compute(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> Tensor:
    """The output (B, N, H, V), contiguous, outside autograd and the dispatcher."""
    if _has_trusted_kernel(q, v, gf, gb, False):
        return _launch(q, k, v, gf, gb, scale)
    return bigla_chunked.bidirectional_gla(q, k, v, gf, gb, scale).contiguous()


def compute_backward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients, contiguous, from the output's, outside autograd and the dispatcher."""
    if _has_trusted_kernel(q, v, gf, gb, True):
        return _launch_backward(q, k, v, gf, gb, do, scale)
    return chunked_backward(q, k, v, gf, gb, do, scale)


def compute_backward_into(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    into: Into,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `compute_backward`, with dq, dk and dv written to `into`; returns the gates' gradients."""
    if _has_trusted_kernel(q, v, gf, gb, True):
        return _launch_backward(q, k, v, gf, gb, do, scale, into)[3:]
    *grads, dgf, dgb = chunked_backward(q, k, v, gf, gb, do, scale)
    for to, grad in zip(into, grads, strict=True):
        to.copy_(grad)
    return dgf, dgb


_forward = torch.library.custom_op('mmvig::bidirectional_gla', compute, mutates_args=())


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> Tensor:
    return q.new_empty(v.shape)


_backward = torch.library.custom_op(
    'mmvig::bidirectional_gla_backward', compute_backward, mutates_args=()
)


def chunked_backward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients of the PyTorch path, contiguous.

    By `torch.func`, since inside an operator PyTorch has autograd switched off.
    """
    function = partial(bigla_chunked.bidirectional_gla, scale=scale)
    _, pull_back = torch.func.vjp(function, q, k, v, gf, gb)
    return tuple(g.contiguous() for g in pull_back(do))


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gf, gb))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[5]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, do: Tensor) -> tuple:
    return (*torch.ops.mmvig.bidirectional_gla_backward(*ctx.saved_tensors, do, ctx.scale), None)


def _refuse(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> None:
    raise RuntimeError(
        'bidirectional_gla is differentiable once on CUDA; for second derivatives call '
        'mmvig.kernels.bigla_chunked.bidirectional_gla, which is plain PyTorch'
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The kernels without the dispatcher, on a GPU where they are trusted."""

    forward = staticmethod(_launch)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, do: Tensor) -> tuple:
        if torch.is_grad_enabled():  # with a graph of its own, at whose end the operator refuses
            return _differentiate(ctx, do)
        return (*_launch_backward(*ctx.saved_tensors, do, ctx.scale), None)
