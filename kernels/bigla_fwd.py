"""Forward of `bidirectional_gla`: which of its three forms a call takes.

Two measure decays from the chunk's edges and are faster: `bigla_fwd_gluon.py`, for Hopper, and
`bigla_fwd_edges.py`. `bigla_fwd_looped.py` is general.
"""

from functools import partial

from torch import Tensor

from mmvig.kernels import bigla_chunked
from mmvig.kernels.bigla_forms import SCALE, Form, Forms, everywhere, fits, in_gluon
from mmvig.kernels.bigla_fwd_edges import forward_from_edges
from mmvig.kernels.bigla_fwd_looped import forward_looped
from mmvig.kernels.bigla_trust import relative_errors

# The factor of q is part of an exponent in the faster forms, so it has to be one and leave room.
SCALES = (2.0**-20, 2.0**20)


def forward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float,
    chunk: int | None = None, chunks: int | None = None,
) -> Tensor:  # fmt: skip
    """Launches the forward.

    Args:
        q, k, v, gf, gb: As in `bidirectional_gla`, last dims contiguous.
        scale: Factor of q.
        chunk, chunks: Tokens of a chunk and chunks of a segment, where not as planned; the faster
            forms heed the latter only.

    Returns:
        (B, N, H, V), contiguous, in the dtype of q.
    """
    inputs = (q, k, v, gf, gb)
    if q.is_cuda and SCALES[0] <= scale <= SCALES[1] and fits(q, v, k, gf, gb):
        form = FORMS.fastest(q.device)
        if form is not None:
            return form.launch(*inputs, scale, chunks=chunks)
    return forward_looped(*inputs, scale, chunk, chunks)


def _measure(form: Form, args: list[Tensor], chunks: int) -> dict[str, float]:
    """Errors ||x - y|| / ||y|| of the output, y in float64.

    Where segments have one chunk also with two and three, since those kernels have loops, and what
    happens at a loop's first step alone hides the rest.
    """
    *inputs, _ = args
    reference = partial(bigla_chunked.bidirectional_gla, scale=SCALE)
    expected = reference(*(x.cpu().double() for x in inputs))
    lengths = (1, 2, 3) if chunks == 1 else (chunks,)
    names = [f'o in segments of {length}' for length in lengths]
    found = [form.launch(*inputs, SCALE, chunks=length) for length in lengths]
    return relative_errors(names, found, [expected] * len(found))


FORMS = Forms(
    'forward',
    (
        in_gluon('bigla_fwd_gluon', 'forward_in_gluon'),
        Form("from the chunk's edges", everywhere, forward_from_edges),
    ),
    _measure,
)
