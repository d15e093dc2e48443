"""Forward of `bidirectional_gla`: which of its two forms a call takes.

`bigla_fwd_edges.py` is faster, `bigla_fwd_looped.py` general.
"""

from functools import partial

from torch import Tensor

from mmvig.kernels import bigla_chunked
from mmvig.kernels.bigla_forms import SCALE, Form, Forms, everywhere, fits
from mmvig.kernels.bigla_fwd_edges import forward_from_edges
from mmvig.kernels.bigla_fwd_looped import forward_looped
from mmvig.kernels.bigla_plan import Plan
from mmvig.kernels.bigla_trust import relative_errors

# The factor of q is part of an exponent in the faster form, so it has to be one and to leave room.
SCALES = (2.0**-20, 2.0**20)


def forward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float, plan: Plan | None = None
) -> Tensor:
    """Launches the forward.

    Args:
        q, k, v, gf, gb: As in `bidirectional_gla`, last dims contiguous.
        scale: Factor of q.
        plan: Launch parameters, of which the faster form heeds `chunks` only.

    Returns:
        (B, N, H, V), contiguous, in the dtype of q.
    """
    inputs = (q, k, v, gf, gb)
    if q.is_cuda and SCALES[0] <= scale <= SCALES[1] and fits(q, v, k, gf, gb):
        form = FORMS.fastest(q.device)
        if form is not None:
            return form.launch(*inputs, scale, chunks=plan.chunks if plan else None)
    return forward_looped(*inputs, scale, plan)


def _measure(form: Form, args: list[Tensor], chunks: int) -> dict[str, float]:
    """Errors ||x - y|| / ||y|| of the output, y in float64.

    Where segments have one chunk also with two, since those kernels have a loop.
    """
    *inputs, _ = args
    reference = partial(bigla_chunked.bidirectional_gla, scale=SCALE)
    expected = reference(*(x.cpu().double() for x in inputs))
    lengths = (1, 2) if chunks == 1 else (chunks,)
    names = [f'o in segments of {length}' for length in lengths]
    found = [form.launch(*inputs, SCALE, chunks=length) for length in lengths]
    return relative_errors(names, found, [expected] * len(found))


FORMS = Forms(
    'forward', (Form("from the chunk's edges", everywhere, forward_from_edges),), _measure
)
