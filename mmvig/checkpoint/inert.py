"""A stand-in for `pickle` that rebuilds tensors and plain containers, and executes nothing else.

`torch.load` takes this module as its `pickle_module`. What a training checkpoint holds beside its
weights (a config object, an optimizer's, a logger's) becomes `Inert`: its class is neither imported
nor called, and its state is dropped. `weights_only=True` would refuse the whole file instead.
"""

import pickle
from collections import OrderedDict
from typing import IO, Any

import torch

# the only objects that a file may name; storages are added by `torch.load`, as mere data types
ALLOWED = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch', 'Size'): torch.Size,
    ('torch._utils', '_rebuild_parameter'): torch._utils._rebuild_parameter,
    ('torch._utils', '_rebuild_tensor'): torch._utils._rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v2'): torch._utils._rebuild_tensor_v2,
}


class Inert:
    """Stands for any other class, function or object, takes all that a pickle does to one."""

    def __new__(cls, *args: object, **kwargs: object) -> 'Inert':
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object) -> 'Inert':
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Drops an item of a list."""

    def extend(self, items: object) -> None:
        """Drops items of a list."""

    def add(self, item: object) -> None:
        """Drops an item of a set."""


class Unpickler(pickle._Unpickler):
    """Unpickler that imports nothing, calls what `ALLOWED` lists, and sets no attributes.

    The class in Python, not the one in C: there, a file could still set attributes of the allowed
    functions and classes.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        """The allowed object of that name, or `Inert`."""
        return ALLOWED.get((module, name), Inert)

    def _drop_state(self) -> None:
        self.stack.pop()

    dispatch[pickle.BUILD[0]] = _drop_state


def load(file: IO[bytes], **kwargs: Any) -> object:
    """As `pickle.load`."""
    return Unpickler(file, **kwargs).load()
