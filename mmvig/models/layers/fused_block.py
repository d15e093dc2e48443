"""ViG's block as one autograd function: the fast form on a GPU, outside `torch.compile`.

The modules in `mixer`, `ffn` and `norm` define the block; this computes the same from their
weights, with the same kernels, in a row. It exists since the host's time bounds small inputs: one
node in the autograd graph in place of twelve, weights cast by one call, gradients of weights in
float32 straight from the products, nothing allocated or checked twice.

Shape legend: B batch, N = h * w tokens, M = B * N, C channels, H heads, F hidden channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmvig.kernels import (
    bigla,
    gated_head_norm_kernels,
    log_gates_kernels,
    residual_norm_kernels,
    swiglu_kernels,
    swiglu_product,
)
from mmvig.kernels.depthwise_conv import launch as convolve
from mmvig.kernels.depthwise_conv import launch_backward as convolve_backward
from mmvig.kernels.log_gates import gate_dtype
from mmvig.kernels.products import wide_product
from mmvig.kernels.shares import sum_shares

Function = torch.autograd.function.FunctionCtx


class Settings(NamedTuple):
    """What a block computes, beside its weights.

    Attributes:
        hw: The map's height and width in tokens.
        num_heads: H.
        act: Activation after the conv, as `depthwise_conv` has it.
        silu: SiLU before the output projection.
        eps: Of the two norms before the branches, and of the mixer's two norms.
        dtype: Of the products.
    """

    hw: tuple[int, int]
    num_heads: int
    act: str
    silu: bool
    eps: tuple[float, float, float]
    dtype: torch.dtype


class Weights(NamedTuple):
    """A block's parameters; the biases of norms may be None."""

    attn_norm: Tensor
    attn_norm_bias: Tensor | None
    conv: Tensor
    qkv: Tensor
    gate: Tensor
    gate_bias: Tensor
    low: Tensor
    log_gate: Tensor
    log_gate_bias: Tensor
    g_norm: Tensor
    l_norm: Tensor
    out: Tensor
    mlp_norm: Tensor
    mlp_norm_bias: Tensor | None
    up: Tensor
    down: Tensor


class Cast(NamedTuple):
    """Weights of the products in their dtype; `into` is qkv, gate and low, one after another."""

    into: Tensor
    out: Tensor
    up: Tensor
    down: Tensor


def cast(dtype: torch.dtype, *sources: Tensor) -> Cast:
    """Casts the weights of the products, `products(weights)`, in one call."""
    low, down = sources[2], sources[5]
    c, f = down.shape
    flat = torch.empty(c * (4 * c + low.shape[0] + 3 * f), dtype=dtype, device=down.device)
    parts = flat.split([t.numel() for t in sources])
    with torch.no_grad():
        torch._foreach_copy_(
            [p.view(t.shape) for p, t in zip(parts, sources, strict=True)], sources
        )
    into = flat[: c * (3 * c + low.shape[0])].view(-1, c)
    return Cast(into, parts[3].view(c, c), parts[4].view(2 * f, c), parts[5].view(c, f))


def products(w: Weights) -> tuple[Tensor, ...]:
    """The weights of the products, in the order of their use."""
    return w.qkv, w.gate, w.low, w.out, w.up, w.down


class Kept(NamedTuple):
    """What the backward needs of the forward: tokens are (M, ...), the stream (B, N, C).

    The norms' results come out of their backward passes again; not that of a norm with a bias.
    """

    stream: Tensor
    normed: Tensor
    local: Tensor
    into: Tensor
    log_fwd: Tensor
    log_bwd: Tensor
    mixed: Tensor
    middle: Tensor
    mlp_normed: Tensor | None
    hidden: Tensor


def forward(
    x: Tensor,
    y: Tensor | None,
    keep: Tensor | None,
    drop: Tensor | None,
    w: Weights,
    half: Cast,
    s: Settings,
    keeps: bool,
) -> tuple[Tensor, Tensor, Kept | None]:
    """See `run`; also what the backward needs, if that is to be kept."""
    b, n, c = x.shape
    stream, normed = residual_norm_kernels.forward(
        x, y, keep, w.attn_norm, w.attn_norm_bias, s.eps[0], s.dtype
    )
    local = convolve(normed, w.conv, None, s.hw, s.act).view(-1, c)
    into = torch.mm(local, half.into.t())
    low = into[:, 3 * c :]
    log_fwd, log_bwd = log_gates_kernels.forward(
        low, w.log_gate, w.log_gate_bias, gate_dtype(s.dtype)
    )
    views = gla_inputs(into, log_fwd, log_bwd, b, s.num_heads)
    mixed = bigla.compute(*views, (c // 2 // s.num_heads) ** -0.5)
    mixed = mixed.view(-1, c)
    blended = gated_head_norm_kernels.forward(
        mixed, local, into[:, 2 * c : 3 * c], w.gate_bias, w.g_norm, w.l_norm, s.silu, s.eps[2]
    )
    branch = torch.mm(blended, half.out.t()).view(b, n, c)
    middle, mlp_normed = residual_norm_kernels.forward(
        stream, branch, drop, w.mlp_norm, w.mlp_norm_bias, s.eps[1], s.dtype
    )
    mlp_normed = mlp_normed.view(-1, c)
    if not keeps:
        product = swiglu_product(mlp_normed, half.up)
        return middle, torch.mm(product, half.down.t()).view(b, n, c), None
    hidden = torch.mm(mlp_normed, half.up.t())
    mlp_normed = None if w.mlp_norm_bias is None else mlp_normed
    branch = torch.mm(swiglu_kernels.forward(hidden), half.down.t()).view(b, n, c)
    kept = Kept(stream, normed, local, into, log_fwd, log_bwd, mixed, middle, mlp_normed, hidden)
    return middle, branch, kept


def gla_inputs(
    into: Tensor, log_fwd: Tensor, log_bwd: Tensor, b: int, h: int
) -> tuple[Tensor, ...]:
    """q, k, v and the log gates as (B, N, H, D), views."""
    q, k, v = heads(into, b, h, log_fwd.shape[1])
    return q, k, v, log_fwd.view(q.shape), log_bwd.view(q.shape)


def heads(into: Tensor, b: int, h: int, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (`half` channels each) and v as (B, N, H, D), views of the product that has them."""
    n, d, width = into.shape[0] // b, half // h, into.shape[1]
    strides = (n * width, width, d, 1)
    at = into.storage_offset()
    return (
        into.as_strided((b, n, h, d), strides, at),
        into.as_strided((b, n, h, d), strides, at + half),
        into.as_strided((b, n, h, 2 * d), (n * width, width, 2 * d, 1), at + 2 * half),
    )


def backward(
    dx: Tensor | None, dy: Tensor, keep: Tensor | None, drop: Tensor | None,
    w: Weights, half: Cast, k: Kept, s: Settings, y_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Weights]:  # fmt: skip
    """Gradients to x, y and the weights, from those of what `run` returns."""
    b, _, c = k.stream.shape
    wide = w.out.dtype
    dy = dy.reshape(-1, c).to(s.dtype)
    dproduct = torch.mm(dy, half.down)
    product = torch.empty_like(dproduct)
    dhidden = swiglu_kernels.backward(k.hidden, dproduct, product)
    ddown = weight_grad(dy, product, wide)
    dnormed = torch.mm(dhidden, half.up)
    again = torch.empty_like(k.mixed) if k.mlp_normed is None else None
    dmiddle, dbranch, share_mlp_norm = residual_norm_kernels.backward(
        k.middle, drop, w.mlp_norm, dx, dnormed, s.eps[1], s.dtype, k.mlp_normed is not None, again
    )
    dup = weight_grad(dhidden, k.mlp_normed if again is None else again, wide)
    dbranch, blended = dbranch.view(-1, c), torch.empty_like(k.mixed)
    # gradients of what one product made, next to each other as that had them
    dinto = torch.empty_like(k.into)
    dmixed, dlocal, _, *share_gated = gated_head_norm_kernels.backward(
        k.mixed, k.local, k.into[:, 2 * c : 3 * c], w.gate_bias, w.g_norm, w.l_norm,
        torch.mm(dbranch, half.out), s.silu, s.eps[2], blended, dinto[:, 2 * c : 3 * c],
    )  # fmt: skip
    dout = weight_grad(dbranch, blended, wide)
    views = gla_inputs(k.into, k.log_fwd, k.log_bwd, b, s.num_heads)
    dfwd, dbwd = bigla.compute_backward_into(
        *views, dmixed.view(views[2].shape), (c // 2 // s.num_heads) ** -0.5,
        heads(dinto, b, s.num_heads, c // 2),
    )  # fmt: skip
    low = k.into[:, 3 * c :]
    dlow, share_log_gate = log_gates_kernels.backward(
        low, w.log_gate, w.log_gate_bias, dfwd.view(-1, c // 2), dbwd.view(-1, c // 2)
    )
    dinto[:, 3 * c :] = dlow
    dlocal.addmm_(dinto, half.into)
    dqkv, dgate, dlow = weight_grad(dinto, k.local, wide).split([2 * c, c, low.shape[1]])
    dlocal = dlocal.view(k.stream.shape)
    dnormed, share_conv = convolve_backward(k.normed, w.conv, None, dlocal, s.hw, s.act, True)
    dx, dy, share_attn_norm = residual_norm_kernels.backward(
        k.stream, keep, w.attn_norm, dmiddle, dnormed, s.eps[0], y_dtype,
        w.attn_norm_bias is not None,
    )  # fmt: skip
    dattn_norm, dconv, dlog_gate, (dg_norm, dl_norm), dgate_bias, dmlp_norm = sum_shares(
        share_attn_norm, share_conv, share_log_gate, *share_gated, share_mlp_norm
    )
    grads = Weights(
        attn_norm=dattn_norm[0],
        attn_norm_bias=None if w.attn_norm_bias is None else dattn_norm[1],
        conv=dconv[:, :9].reshape(w.conv.shape),
        qkv=dqkv,
        gate=dgate,
        gate_bias=dgate_bias,
        low=dlow,
        log_gate=dlog_gate[:-1].t(),
        log_gate_bias=dlog_gate[-1],
        g_norm=dg_norm,
        l_norm=dl_norm,
        out=dout,
        mlp_norm=dmlp_norm[0],
        mlp_norm_bias=None if w.mlp_norm_bias is None else dmlp_norm[1],
        up=dup,
        down=ddown,
    )
    return dx, dy, grads


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Function,
        x: Tensor,
        y: Tensor | None,
        keep: Tensor | None,
        drop: Tensor | None,
        settings: Settings,
        half: Cast | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weights = Weights(*weights)
        half = cast(settings.dtype, *products(weights)) if half is None else half
        middle, branch, kept = forward(x, y, keep, drop, weights, half, settings, keeps=True)
        ctx.save_for_backward(keep, drop, *weights, *half, *kept)
        ctx.settings, ctx.y_dtype = settings, None if y is None else y.dtype
        ctx.set_materialize_grads(False)
        return middle, branch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Function, dx: Tensor | None, dy: Tensor | None) -> tuple:
        keep, drop, *saved = ctx.saved_tensors
        weights, saved = Weights(*saved[:16]), saved[16:]
        half, kept = Cast(*saved[:4]), Kept(*saved[4:])
        if dy is None:
            dy = torch.zeros_like(kept.stream, dtype=ctx.settings.dtype)
        dx = None if dx is None else dx.contiguous()
        dx, dy, grads = backward(dx, dy, keep, drop, weights, half, kept, ctx.settings, ctx.y_dtype)
        return dx, dy, None, None, None, None, *grads


def weight_grad(grad: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """grad.T @ rows in the weight's dtype, which is that of the products or wider."""
    return wide_product(grad.t(), rows, dtype)


def run(
    x: Tensor,
    y: Tensor | None,
    keep: Tensor | None,
    drop: Tensor | None,
    weights: Weights,
    half: Cast | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """A block, but for its last addition, which the next one's first norm does.

    With `s = x + keep * y`: `m = s + drop * mixer(norm(s))`, and returns m and `ffn(norm(m))`.

    Args:
        x: (B, N, C), contiguous, the residual stream.
        y: (B, N, C), what the block before adds; or None.
        keep: (B,), its drop path's factors; or None.
        drop: (B,), this mixer's; or None.
        weights: The parameters.
        half: The weights of the products, cast; if None they are cast here.
        settings: All else.

    Returns:
        (B, N, C) each, the first in the dtype of the stream, the second in that of the products.
    """
    if torch.is_grad_enabled():
        return _Block.apply(x, y, keep, drop, settings, half, *weights)
    half = cast(settings.dtype, *products(weights)) if half is None else half
    return forward(x, y, keep, drop, weights, half, settings, keeps=False)[:2]
