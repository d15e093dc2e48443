"""Linear layers with few kernels and few calls: several that read the same tokens as one product.

On a GPU, outside `torch.compile`, a call is one autograd function. It casts the weights, under
autocast, into one buffer, multiplies once, and in the backward gets the gradients of weights in
float32 straight from products, where PyTorch rounds them, and those of biases from small kernels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.kernels.dispatch import form, working_dtype
from mmvig.kernels.products import wide_product
from mmvig.models.layers.kept import Kept

# Where cast parameters go, and groups of them that are joined: weights and biases of one product,
# or the weights of each of several
Product = tuple[Kept | Sequence[Tensor], ...]
ALIGNMENT = 64  # numbers


class Linear(nn.Linear):
    """`nn.Linear`, computed by `merged_linear`; in inference with weights that are cast once."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self._kept = keep_joined(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        biases = () if self.bias is None else (self.bias,)
        return merged_linear(x, [self.weight], biases, self._kept)[0]

    def products(self) -> Product:
        """For `cast_ahead`."""
        return self._kept, [self.weight], [] if self.bias is None else [self.bias]


def keep_joined(count: int) -> Kept:
    """For so many linears: what `merged_linear` makes of their weights and biases."""
    return Kept(partial(_join_all, count))


def merged_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    kept: Kept | None = None,
) -> Sequence[Tensor]:
    """Several linears on the same input: on a GPU one product.

    Args:
        x: (..., in_features).
        weights: (out_features, in_features) of each linear.
        biases: (out_features,) of each linear, or none at all.
        kept: What `keep_joined` returned, to be used for these linears alone; or None.

    Returns:
        (..., out_features) of each linear: on a GPU column blocks of one buffer.
    """
    way = form(x, *weights, *biases)
    if way == 'plain' or (way == 'registered' and len(weights) == 1):
        biases = biases or [None] * len(weights)
        return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    if way == 'registered':
        out = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
        return out.split([w.shape[0] for w in weights], -1)
    dtype = working_dtype(x)
    if torch.is_grad_enabled():
        ahead = () if kept is None or kept.ahead is None else kept.ahead
        ahead = [t for t in ahead if t.dtype == dtype] + [None] * 2
        outs = _MergedLinear.apply(x, len(weights), dtype, *ahead[:2], *weights, *biases)
        return [outs] if len(weights) == 1 else outs
    kept = kept or keep_joined(len(weights))
    out = multiply(x, *kept(dtype, *weights, *biases))
    return out.split([w.shape[0] for w in weights], -1)


@contextmanager
def cast_ahead(products: Sequence[Product], dtype: torch.dtype) -> Iterator[None]:
    """Casts the parameters of many products by one call, for a forward pass inside."""
    groups = [group for _, *parts in products for group in parts if group]
    sizes = [sum(p.numel() for p in group) for group in groups]
    places = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    flat = torch.empty(sum(places), dtype=dtype, device=groups[0][0].device)
    joined, parts = [], []
    for place, size, group in zip(flat.split(places), sizes, groups, strict=True):
        joined.append(place[:size].view(-1, *group[0].shape[1:]))
        parts += joined[-1].split([p.shape[0] for p in group])
    with torch.no_grad():
        torch._foreach_copy_(parts, [p for group in groups for p in group])
    left = iter(joined)
    for kept, *parts in products:
        kept.ahead = tuple(next(left) for group in parts if group)
    try:
        yield
    finally:
        for kept, *_ in products:
            kept.ahead = None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in_features) to (..., out_features) in the weight's dtype, outside autograd."""
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], -1)


def _join_all(count: int, dtype: torch.dtype, *params: Tensor) -> tuple[Tensor, ...]:
    """The weights of `count` linears as one, and the biases, if they have any."""
    parts = (params[:count], params[count:])
    return tuple(_joined(part, dtype) for part in parts if part)


def _joined(params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Parameters one after another in one tensor of a dtype."""
    if len(params) == 1:
        return params[0].to(dtype)
    sizes = [p.shape[0] for p in params]
    joined = torch.empty(sum(sizes), *params[0].shape[1:], dtype=dtype, device=params[0].device)
    torch._foreach_copy_(joined.split(sizes), params)
    return joined


def side_by_side(blocks: Sequence[Tensor]) -> Tensor:
    """Matrices (..., N_i) as one (..., sum of N_i), without a copy where they are parts of one."""
    if len(blocks) == 1:
        return blocks[0]
    first, width = blocks[0], sum(x.shape[-1] for x in blocks)
    at, strides = first.storage_offset(), [width, 1]
    for n in reversed(first.shape[1:-1]):
        strides.insert(0, n * strides[0])
    for x in blocks:
        one = x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not one or x.storage_offset() != at or list(x.stride()) != strides:
            return torch.cat(blocks, -1)
        at += x.shape[-1]
    return first.as_strided((*first.shape[:-1], width), strides)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        count: int,
        dtype: torch.dtype,
        weight: Tensor | None,
        bias: Tensor | None,
        *params: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """Weight and bias are the joined parameters in the dtype, where they were cast before."""
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weight = _joined(params[:count], dtype) if weight is None else weight
        if len(params) > count:
            bias = _joined(params[count:], dtype) if bias is None else bias
            out = torch.addmm(bias, rows, weight.t())
        else:
            out = torch.mm(rows, weight.t())
        ctx.save_for_backward(rows, weight)
        ctx.sizes = [p.shape[0] for p in params[:count]]
        ctx.x_like = (x.shape, x.dtype)
        ctx.has_bias = len(params) > count
        ctx.param_dtype = params[0].dtype
        out = out.view(*x.shape[:-1], -1)
        return out if count == 1 else out.split(ctx.sizes, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple:
        rows, weight = ctx.saved_tensors
        shape, dtype = ctx.x_like
        grad = side_by_side(grads)
        grad = grad.reshape(-1, weight.shape[0]).to(rows.dtype)
        dx = dweights = dbiases = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(grad, weight).view(shape)
        if any(ctx.needs_input_grad[5:]):
            dweight = wide_product(grad.t(), rows, ctx.param_dtype)
            dweights = dweight.split(ctx.sizes)
            if ctx.has_bias:
                # Imported here since PyTorch builds for the CPU come without Triton.
                from mmvig.kernels.shares import sum_rows

                dbiases = sum_rows(grad).to(ctx.param_dtype).split(ctx.sizes)
        else:
            dweights = [None] * len(ctx.sizes)
            dbiases = dweights
        return dx, None, None, None, None, *dweights, *((dbiases or ()) if ctx.has_bias else ())
