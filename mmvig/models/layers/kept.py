"""What inference makes of parameters alone, kept until they change: weights in half precision.

A CUDA graph may read what is kept, too, if whoever replays it has it made anew before:

    with recording() as read:
        ...  # the capture
    for kept in read:  # before each replay
        kept.refresh()
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmvig.kernels.dispatch import stands_in

Tensors = tuple[Tensor, ...]
_READ: list[list['Made']] = []  # of the recordings that are under way, one or none


def is_capturing(device: torch.device) -> bool:
    """Whether operators on the device are recorded in a CUDA graph at present."""
    on_gpu = device.type == 'cuda' and torch.cuda.is_initialized()
    return on_gpu and torch.cuda.is_current_stream_capturing()


@contextmanager
def recording() -> Iterator[list['Made']]:
    """Lets a CUDA graph that is captured inside read what is kept; gives the list of what it reads.

    What is not kept, or not up to date, is made inside the graph.
    """
    _READ.append([])
    try:
        yield _READ[-1]
    finally:
        _READ.pop()


class Made:
    """Tensors that a function makes of parameters; they stay in place when made anew.

    Args:
        make: The function.
        setting: Its first argument.
        params: The others.
    """

    def __init__(self, make: Callable[..., Tensors], setting: Hashable, params: Tensors) -> None:
        self._make, self._setting, self.params = make, setting, params
        self._state: tuple = ()
        self.tensors: Tensors = ()

    def is_fresh(self) -> bool:
        """Whether the parameters are those that the tensors were made of."""
        return self._state == self._now()

    def refresh(self) -> None:
        """Makes the tensors anew if the parameters have changed."""
        if self.is_fresh():
            return
        with torch.inference_mode(False), torch.no_grad():
            made = self._make(self._setting, *self.params)
            if _likes(made) == _likes(self.tensors):
                for old, new in zip(self.tensors, made, strict=True):
                    if old is not new:  # a parameter itself, where nothing had to be done
                        old.copy_(new)
            else:
                self.tensors = made
        self._state = self._now()

    def _now(self) -> tuple:
        # a step of an optimizer or a loaded checkpoint changes a version, a move a pointer
        return tuple((p.data_ptr(), p._version) for p in self.params)


class Kept:
    """Calls a function of parameters; in inference again only when one of them has changed.

    Parameters that are changed through `param.data` count as unchanged. No module: holds no state
    that belongs into a checkpoint, and copies of a model start with nothing kept.

    Args:
        make: A setting and parameters to a tuple of tensors, parameters themselves or new ones; a
            function that can be pickled.
        max_settings: Of how many settings the tensors are kept, those used last.

    Attributes:
        ahead: What `linear.cast_ahead` has made for the pass that is under way, or None.
    """

    def __init__(self, make: Callable[..., Tensors], max_settings: int = 2) -> None:
        self._make = make
        self._max_settings = max_settings
        self._made: OrderedDict[Hashable, Made] = OrderedDict()
        self.ahead: Tensors | None = None

    def __call__(self, setting: Hashable, *params: Tensor) -> Tensors:
        """What the function returns; not differentiable where it was kept."""
        if not _can_keep(params):
            return self._make(setting, *params)
        made = self._made.get(setting)
        if made is None:
            made = Made(self._make, setting, params)
        made.params = params
        if is_capturing(params[0].device):
            if not (_READ and made.is_fresh()):
                return self._make(setting, *params)
            _READ[-1].append(made)
            return made.tensors
        made.refresh()
        self._made[setting] = made
        self._made.move_to_end(setting)
        while len(self._made) > self._max_settings:
            self._made.popitem(last=False)
        return made.tensors

    def __deepcopy__(self, memo: dict) -> 'Kept':
        return Kept(self._make, self._max_settings)

    def __getstate__(self) -> dict:
        return {**vars(self), '_made': OrderedDict(), 'ahead': None}


def _can_keep(params: Tensors) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # inference tensors count no versions; stand-ins have no pointers
    return not any(p.is_inference() or p.is_meta or stands_in(p) for p in params)


def _likes(tensors: Tensors) -> list[tuple]:
    return [(t.shape, t.dtype, t.device) for t in tensors]


def cast(dtype: torch.dtype, *params: Tensor) -> Tensors:
    """The parameters in a dtype, copied by one call; those of convs channels last in memory."""
    made = tuple(
        torch.empty_like(
            p,
            dtype=dtype,
            memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format,
        )
        for p in params
    )
    with torch.no_grad():
        torch._foreach_copy_(list(made), list(params))
    return made
