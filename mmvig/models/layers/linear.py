"""Linear layers with few kernels and few calls: several that read the same tokens as one product.

On a GPU, outside `torch.compile`, a call is one autograd function. It casts the weights, under
autocast, into one buffer, multiplies once, and in the backward gets the gradients of weights and
biases in float32 straight from products, where PyTorch rounds them and casts or sums them slowly.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.kernels.dispatch import form, working_dtype

# whether mm can return float32 for products of half precision (PyTorch 2.8)
WIDE_RESULTS = hasattr(torch.ops.aten.mm, 'dtype')


class Linear(nn.Linear):
    """`nn.Linear`, computed by `merged_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        biases = () if self.bias is None else (self.bias,)
        return merged_linear(x, [self.weight], biases)[0]


def merged_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> Sequence[Tensor]:
    """Several linears on the same input: on a GPU one product.

    Args:
        x: (..., in_features).
        weights: (out_features, in_features) of each linear.
        biases: (out_features,) of each linear, or none at all.

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
    outs = _MergedLinear.apply(x, len(weights), working_dtype(x), *weights, *biases)
    return [outs] if len(weights) == 1 else outs


def _joined(params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Parameters one after another in one tensor of a dtype."""
    if len(params) == 1:
        return params[0].to(dtype)
    sizes = [p.shape[0] for p in params]
    joined = torch.empty(sum(sizes), *params[0].shape[1:], dtype=dtype, device=params[0].device)
    torch._foreach_copy_(joined.split(sizes), params)
    return joined


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, (M, K) and (K, N) of one dtype, as (M, N) in that dtype or a wider one."""
    if WIDE_RESULTS and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        count: int,
        dtype: torch.dtype,
        *params: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weight = _joined(params[:count], dtype)
        if len(params) > count:
            out = torch.addmm(_joined(params[count:], dtype), rows, weight.t())
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
        grad = grads[0] if len(grads) == 1 else torch.cat(grads, -1)
        grad = grad.reshape(-1, weight.shape[0]).to(rows.dtype)
        dx = dweights = dbiases = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(grad, weight).view(shape)
        if any(ctx.needs_input_grad[3:]):
            dweight = wide_product(grad.t(), rows, ctx.param_dtype)
            dweights = dweight.split(ctx.sizes)
            if ctx.has_bias:
                ones = torch.ones(1, grad.shape[0], dtype=grad.dtype, device=grad.device)
                dbiases = wide_product(ones, grad, ctx.param_dtype)[0].split(ctx.sizes)
        else:
            dweights = [None] * len(ctx.sizes)
            dbiases = dweights
        return dx, None, None, *dweights, *((dbiases or ()) if ctx.has_bias else ())
