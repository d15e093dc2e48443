"""Backward of `bidirectional_gla`: which of its three forms a call takes.

Two compute one chunk a program and are faster: `bigla_bwd_gluon.py`, for Hopper, and
`bigla_bwd_chunks.py`. `bigla_bwd_looped.py` walks a segment a program and is general.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import triton
from torch import Tensor

from mmvig.kernels import bigla_chunked
from mmvig.kernels.bigla_bwd_chunks import backward_by_chunks
from mmvig.kernels.bigla_bwd_looped import backward_looped
from mmvig.kernels.bigla_forms import SCALE, Form, Forms, everywhere, fits
from mmvig.kernels.bigla_plan import Plan
from mmvig.kernels.bigla_trust import NAMES, relative_errors

# Gluon is experimental, and another in every version of Triton; this one's code was looked through.
GLUON_VERSIONS = ('3.6.',)


def backward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward: gradients of q, k, v and both gates, each in its tensor's dtype.

    Args:
        q, k, v, gf, gb, do: As in `bidirectional_gla`, and the output's gradient, (B, N, H, V);
            last dims contiguous.
        scale: Factor of q.
        plan: Launch parameters, of which the forms by chunks heed `chunks` only.
    """
    inputs = (q, k, v, gf, gb, do)
    if q.is_cuda and fits(q, v, k, gf, gb, do):
        form = FORMS.fastest(q.device)
        if form is not None:
            return form.launch(*inputs, scale, chunks=plan.chunks if plan else None)
    return backward_looped(*inputs, scale, plan)


def _has_gluon(device: torch.device) -> bool:
    """Whether the device is of Hopper's kind and Triton has the Gluon that the kernels are in."""
    if not (torch.cuda.is_available() and triton.__version__.startswith(GLUON_VERSIONS)):
        return False
    return torch.cuda.get_device_capability(device)[0] == 9 and _gluon_launcher() is not None


@lru_cache
def _gluon_launcher() -> Callable[..., tuple[Tensor, ...]] | None:
    """Imported here, where Triton has Gluon at all; None where it has not, or another."""
    try:
        from mmvig.kernels.bigla_bwd_gluon import backward_in_gluon
    except Exception:  # an experimental language may be incomplete in any way
        return None
    return backward_in_gluon


def _launch_gluon(*args: Tensor | float, chunks: int | None = None) -> tuple[Tensor, ...]:
    return _gluon_launcher()(*args, chunks=chunks)


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
        Form('in Gluon', _has_gluon, _launch_gluon),
        Form('by chunks', everywhere, backward_by_chunks),
    ),
    _measure,
)
