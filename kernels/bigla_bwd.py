"""Backward of `bidirectional_gla`: which of its three forms a call takes.

Two compute one chunk a program and are faster: `bigla_bwd_gluon.py`, for Hopper, and
`bigla_bwd_chunks.py`. `bigla_bwd_looped.py` walks a segment a program and is general.
"""

from functools import partial

import torch
from torch import Tensor

from mmvig.kernels import bigla_chunked
from mmvig.kernels.bigla_bwd_chunks import backward_by_chunks
from mmvig.kernels.bigla_bwd_looped import backward_looped
from mmvig.kernels.bigla_bwd_outputs import Gradients, Into
from mmvig.kernels.bigla_forms import SCALE, Form, Forms, everywhere, fits, in_gluon
from mmvig.kernels.bigla_trust import NAMES, relative_errors


def backward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    chunk: int | None = None, chunks: int | None = None, into: Into | None = None,
) -> Gradients:  # fmt: skip
    """Launches the backward: gradients of q, k, v and both gates, each in its tensor's dtype.

    Args:
        q, k, v, gf, gb, do: As in `bidirectional_gla`, and the output's gradient, (B, N, H, V);
            last dims contiguous.
        scale: Factor of q.
        chunk, chunks: Tokens of a chunk and chunks of a segment, where not as planned; the forms
            by chunks heed the latter only.
        into: Where dq, dk and dv are written, and what is returned of them; contiguous if None.
    """
    inputs = (q, k, v, gf, gb, do)
    if q.is_cuda and fits(q, v, k, gf, gb, do):
        form = FORMS.fastest(q.device)
        if form is not None:
            return form.launch(*inputs, scale, chunks=chunks, into=into)
    return backward_looped(*inputs, scale, chunk, chunks, into)


def _measure(form: Form, args: list[Tensor], chunks: int) -> dict[str, float]:
    """Errors ||x - y|| / ||y|| of the gradients, by name, y in float64."""
    *inputs, do = (x.cpu().double() for x in args)
    # torch.func also works inside an operator, where PyTorch has autograd switched off
    _, pull_back = torch.func.vjp(partial(bigla_chunked.bidirectional_gla, scale=SCALE), *inputs)
    found = form.launch(*args, SCALE, chunks=chunks)
    return relative_errors(NAMES[1:], found, pull_back(do))


FORMS = Forms(
    'backward',
    (
        in_gluon('bigla_bwd_gluon', 'backward_in_gluon'),
        Form('by chunks', everywhere, backward_by_chunks),
    ),
    _measure,
)
