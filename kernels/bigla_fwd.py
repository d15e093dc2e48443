"""Forward of `bidirectional_gla` in Triton: which of its two forms a call takes.

`bigla_fwd_edges.py` is faster, but has been compared and timed on a GPU for the one case that the
ViG networks have in half precision. `bigla_fwd_looped.py` takes everything else.
"""

import warnings
from functools import partial

import torch
from torch import Tensor

from mmvig.kernels import bigla_chunked
from mmvig.kernels.bigla_fwd_edges import forward_from_edges
from mmvig.kernels.bigla_fwd_looped import forward_looped
from mmvig.kernels.bigla_plan import Plan
from mmvig.kernels.bigla_trust import relative_errors, search_fault

KEY_DIM, VALUE_DIM, DTYPE = 32, 64, torch.bfloat16
# The factor of q is part of an exponent there, which has to be one and to leave room.
SCALES = (2.0**-20, 2.0**20)

# Devices on which the faster form was compared with float64, and what came out.
_right: dict[torch.device, bool] = {}


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
    if q.is_cuda and _fits(*inputs, scale) and _is_right(q.device):
        return forward_from_edges(*inputs, scale, chunks=plan.chunks if plan else None)
    return forward_looped(*inputs, scale, plan)


def _fits(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> bool:
    """Whether these are compiled to what was compared: dtypes, dims, rows aligned to 16 bytes."""
    inputs = (q, k, v, gf, gb)
    return (
        q.shape[-1] == KEY_DIM
        and v.shape[-1] == VALUE_DIM
        and SCALES[0] <= scale <= SCALES[1]
        and all(x.dtype == DTYPE and x.data_ptr() % 16 == 0 for x in inputs)
        and all(stride % 16 == 0 for x in inputs for stride in x.stride()[:3])
    )


def _is_right(device: torch.device) -> bool:
    """Whether the faster form passed its check, which runs once per process.

    Not while a CUDA graph is captured, when nothing may synchronize: what was not checked before
    then takes the other form.
    """
    if device not in _right:
        if torch.cuda.is_current_stream_capturing():
            return False
        fault = find_fault(device)
        _right[device] = fault is None
        if fault is not None:
            warnings.warn(
                f'bidirectional_gla: the faster forward is wrong on this machine ({fault}); '
                'using the slower one',
                RuntimeWarning,
                stacklevel=2,
            )
    return _right[device]


def find_fault(device: torch.device) -> str | None:
    """What is wrong with the faster form, in words; None where it is right."""
    return search_fault(_measure, device, DTYPE, DTYPE, KEY_DIM, VALUE_DIM)


def _measure(args: list[Tensor], chunks: int) -> dict[str, float]:
    """Errors ||x - y|| / ||y|| of the output, y in float64.

    Where segments have one chunk also with two, since those kernels have a loop.
    """
    scale = KEY_DIM**-0.5
    *inputs, _ = args
    reference = partial(bigla_chunked.bidirectional_gla, scale=scale)
    expected = reference(*(x.cpu().double() for x in inputs))
    lengths = (1, 2) if chunks == 1 else (chunks,)
    names = [f'o in segments of {length}' for length in lengths]
    found = [forward_from_edges(*inputs, scale, chunks=length) for length in lengths]
    return relative_errors(names, found, [expected] * len(found))
