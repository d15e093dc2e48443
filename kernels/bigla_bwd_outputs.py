"""Where the backwards of `bidirectional_gla` write.

Several blocks of value channels give shares of dq, dk and the gates' gradients, which are summed.
dq, dk and dv may go where the caller wants them: next to each other, as the product that made q, k
and v has them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# dq and dk (B, N, H, K) and dv (B, N, H, V): any strides between tokens, that of dq and dk the
# same; N times as much between batch elements, and heads that follow each other.
Into = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def new_outputs(inputs: Sequence[Tensor], blocks: int, into: Into | None) -> Gradients:
    """Memory for what the kernels write: dq, dk, dv and the gradients of both gates.

    Args:
        inputs: q, k, v and both gates first.
        blocks: Of value channels; all but dv are (blocks, B, N, H, K), float32, if several.
        into: Where dq, dk and dv are wanted, if anywhere.
    """
    q, k, v, gf, gb = inputs[:5]
    if blocks == 1:
        return *(into or (_like(q), _like(k), _like(v))), _like(gf), _like(gb)
    dq, dk, dgf, dgb = (
        torch.empty(blocks, *x.shape, dtype=torch.float32, device=x.device) for x in (q, k, gf, gb)
    )
    return dq, dk, into[2] if into else _like(v), dgf, dgb


def row_strides(outputs: Gradients) -> tuple[int, int]:
    """Between tokens, of dq and dk and of dv."""
    return outputs[1].stride(-3), outputs[2].stride(1)


def add_shares(
    outputs: Gradients, inputs: Sequence[Tensor], blocks: int, into: Into | None
) -> Gradients:
    """The gradients in their tensors' dtypes, from what the kernels have written."""
    if blocks == 1:
        return outputs
    dq, dk, dv, dgf, dgb = outputs
    q, k, _, gf, gb = inputs[:5]
    dq, dk, dgf, dgb = (
        d.sum(0).to(x.dtype) for d, x in zip((dq, dk, dgf, dgb), (q, k, gf, gb), strict=True)
    )
    if into:
        dq, dk = into[0].copy_(dq), into[1].copy_(dk)
    return dq, dk, dv, dgf, dgb


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
