"""Backward of `bidirectional_gla`: which of its three forms a call takes.

Two compute one chunk a program: `bigla_bwd_gluon.py`, for Hopper, and `bigla_bwd_chunks.py`. They
are faster, but have been compared and timed on a GPU for the one case that the ViG networks have in
half precision. `bigla_bwd_looped.py` walks a segment a program and takes everything else.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import triton
from torch import Tensor

from mmvig.kernels import bigla_chunked
from mmvig.kernels.bigla_bwd_chunks import backward_by_chunks
from mmvig.kernels.bigla_bwd_looped import backward_looped
from mmvig.kernels.bigla_plan import Plan
from mmvig.kernels.bigla_trust import NAMES, relative_errors, search_fault

KEY_DIM, VALUE_DIM, DTYPE = 32, 64, torch.bfloat16
# Gluon is experimental, and another in every version of Triton; this one's code was looked through.
GLUON_VERSIONS = ('3.6.',)
SEGMENTS = 'by segments'


@dataclass(frozen=True)
class Form:
    """A form of the backward that is used where it passed its check.

    Attributes:
        name: As warnings and the doctor's table have it.
        available: Whether this Triton can have it on a device, right or not.
        launch: Takes the six tensors, scale and `chunks`, as `backward_by_chunks`.
    """

    name: str
    available: Callable[[torch.device], bool]
    launch: Callable[..., tuple[Tensor, ...]]


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
    if q.is_cuda and _fits(*inputs):
        form = _fastest(q.device)
        if form is not None:
            return form.launch(*inputs, scale, chunks=plan.chunks if plan else None)
    return backward_looped(*inputs, scale, plan)


def _fits(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor) -> bool:
    """Whether these are compiled to what was compared: dtypes, dims, rows aligned to 16 bytes."""
    inputs = (q, k, v, gf, gb, do)
    return (
        q.shape[-1] == KEY_DIM
        and v.shape[-1] == VALUE_DIM
        and all(x.dtype == DTYPE and x.data_ptr() % 16 == 0 for x in inputs)
        and all(stride % 16 == 0 for x in inputs for stride in x.stride()[:3])
    )


def _everywhere(device: torch.device) -> bool:
    return True


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


# The fastest first; without `SEGMENTS`, which takes what they do not, unchecked.
FORMS = (
    Form('in Gluon', _has_gluon, _launch_gluon),
    Form('by chunks', _everywhere, backward_by_chunks),
)

# Forms, by name, on devices where they were compared with float64, and what came out.
_right: dict[tuple[str, torch.device], bool] = {}


def _fastest(device: torch.device) -> Form | None:
    """The first form that passed its check, which runs once per process; None if none did.

    While a CUDA graph is captured nothing may synchronize: then only what was checked before.
    """
    for form in FORMS:
        right = _right.get((form.name, device))
        if right or (right is None and _is_right(form, device)):
            return form
    return None


def _is_right(form: Form, device: torch.device) -> bool:
    """Checks a form, unless a CUDA graph is captured; warns of one that is wrong."""
    if torch.cuda.is_current_stream_capturing():
        return False
    available = form.available(device)
    fault = find_fault(form, device) if available else None
    _right[form.name, device] = available and fault is None
    if fault is not None:
        warnings.warn(
            f'bidirectional_gla: the backward {form.name} is wrong on this machine ({fault}); '
            'using a slower one. Run python -m mmvig.doctor for details',
            RuntimeWarning,
            stacklevel=2,
        )
    return _right[form.name, device]


def find_fault(form: Form, device: torch.device) -> str | None:
    """What is wrong with a form, in words; None where it is right."""
    return search_fault(partial(_measure, form), device, DTYPE, DTYPE, KEY_DIM, VALUE_DIM)


def _measure(form: Form, args: list[Tensor], chunks: int) -> dict[str, float]:
    """Errors ||x - y|| / ||y|| of the gradients, by name, y in float64."""
    scale = KEY_DIM**-0.5
    *inputs, do = (x.cpu().double() for x in args)
    # torch.func also works inside an operator, where PyTorch has autograd switched off
    _, pull_back = torch.func.vjp(partial(bigla_chunked.bidirectional_gla, scale=scale), *inputs)
    found = form.launch(*args, scale, chunks=chunks)
    return relative_errors(NAMES[1:], found, pull_back(do))


def available_forms(device: torch.device) -> list[str]:
    """Names of the forms that a call with what they fit could take, the fastest first."""
    return [*(form.name for form in FORMS if form.available(device)), SEGMENTS]


def take_form(name: str, device: torch.device) -> None:
    """Has this process take one form wherever it fits, unchecked; `SEGMENTS`, none of `FORMS`.

    For checks and measurements: a form's own check would hide it, if wrong, behind the next.
    """
    for form in FORMS:
        _right[form.name, device] = form.name == name
