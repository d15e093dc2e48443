"""Forms of the forward and backward of `bidirectional_gla` that are used where they are right.

Each pass has a general form, which takes any dtypes and head sizes, and faster ones for the one
case that the ViG networks have in half precision; only that was compared and timed on a GPU.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module

import torch
import triton
from torch import Tensor

from mmvig.kernels.bigla_trust import search_fault

KEY_DIM, VALUE_DIM, DTYPE = 32, 64, torch.bfloat16
SCALE = KEY_DIM**-0.5  # of the checks
# Gluon is experimental, and another in every version of Triton; this one's code was looked through.
GLUON_VERSIONS = ('3.6.',)


@dataclass(frozen=True)
class Form:
    """A form of a pass.

    Attributes:
        name: As warnings and the doctor's table have it.
        available: Whether a device can have it, right or not.
        launch: Takes the pass's tensors, scale and `chunks` of a segment.
    """

    name: str
    available: Callable[[torch.device], bool]
    launch: Callable[..., Tensor | tuple[Tensor, ...]]


class Forms:
    """The faster forms of a pass, the fastest first.

    Args:
        what: The pass, in warnings.
        forms: The forms.
        measure: Takes a form, what `bigla_trust.draw` returns and the chunks of a segment, and
            returns errors by name, as `bigla_trust.measure`.
    """

    def __init__(
        self,
        what: str,
        forms: Sequence[Form],
        measure: Callable[[Form, list[Tensor], int], dict[str, float]],
    ) -> None:
        self._what, self._forms, self._measure = what, forms, measure
        # forms, by name, on devices where they were compared with float64, and what came out
        self._right: dict[tuple[str, torch.device], bool] = {}

    def __iter__(self) -> Iterator[Form]:
        return iter(self._forms)

    def fastest(self, device: torch.device) -> Form | None:
        """The first form that passed its check, which runs once per process; None if none did.

        While a CUDA graph is captured nothing may synchronize: then only what was checked before.
        """
        for form in self._forms:
            right = self._right.get((form.name, device))
            if right or (right is None and self._is_right(form, device)):
                return form
        return None

    def find_fault(self, form: Form, device: torch.device) -> str | None:
        """What is wrong with a form, in words; None where it is right."""
        measure = partial(self._measure, form)
        return search_fault(measure, device, DTYPE, DTYPE, KEY_DIM, VALUE_DIM)

    def available(self, device: torch.device) -> list[str]:
        """Names of the forms that a call with what they fit could take, the fastest first."""
        return [form.name for form in self._forms if form.available(device)]

    def take(self, name: str | None, device: torch.device) -> None:
        """Has this process take one form wherever it fits, unchecked; None, the general one.

        For checks and measurements: a form's own check would hide it, if wrong, behind the next.
        """
        for form in self._forms:
            self._right[form.name, device] = form.name == name

    def forget(self) -> None:
        """Has every form checked anew at its next use."""
        self._right.clear()

    def _is_right(self, form: Form, device: torch.device) -> bool:
        """Checks a form, unless a CUDA graph is captured; warns of one that is wrong."""
        if torch.cuda.is_current_stream_capturing():
            return False
        available = form.available(device)
        fault = self.find_fault(form, device) if available else None
        self._right[form.name, device] = available and fault is None
        if fault is not None:
            warnings.warn(
                f'bidirectional_gla: the {self._what} {form.name} is wrong on this machine '
                f'({fault}); using a slower one. Run python -m mmvig.doctor for details',
                RuntimeWarning,
                stacklevel=2,
            )
        return self._right[form.name, device]


def everywhere(device: torch.device) -> bool:
    """For forms that any device can have."""
    return True


def in_gluon(module: str, function: str) -> Form:
    """The form in Gluon that a function of one of these modules launches.

    The module is imported where Triton has its Gluon, and the device is of Hopper's kind.
    """

    @lru_cache
    def launcher() -> Callable[..., Tensor | tuple[Tensor, ...]] | None:
        try:
            return getattr(import_module(f'mmvig.kernels.{module}'), function)
        except Exception:  # an experimental language may be incomplete in any way
            return None

    def available(device: torch.device) -> bool:
        if not (torch.cuda.is_available() and triton.__version__.startswith(GLUON_VERSIONS)):
            return False
        return torch.cuda.get_device_capability(device)[0] == 9 and launcher() is not None

    def launch(*args: Tensor | float, **settings: object) -> Tensor | tuple[Tensor, ...]:
        return launcher()(*args, **settings)

    return Form('in Gluon', available, launch)


def fits(q: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether these are compiled to what was compared: dtypes, dims, rows aligned to 16 bytes."""
    inputs = (q, v, *others)
    return (
        q.shape[-1] == KEY_DIM
        and v.shape[-1] == VALUE_DIM
        and all(x.dtype == DTYPE and x.data_ptr() % 16 == 0 for x in inputs)
        and all(stride % 16 == 0 for x in inputs for stride in x.stride()[:3])
    )
