"""A stand-in for `pickle` that rebuilds tensors and plain containers, and executes nothing else.

`torch.load` takes this module as its `pickle_module`. What a training checkpoint holds beside its
weights (a config object, an optimizer's, a logger's) becomes `Inert`: its class is neither imported
nor called, and its state is dropped. `weights_only=True` would refuse the whole file instead.

A file that names what only an attacker would have called, a program's start or `eval`, is refused.
That list is not the defence, since nothing else is executed either: it tells the user.
"""

import pickle
from collections import OrderedDict
from itertools import product
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
# modules that start programs, run code or reach the system, with all in them; no checkpoint of
# weights, settings and logs has a reason to name them
FORBIDDEN_MODULES = frozenset(
    (
        *('os', 'posix', 'nt', 'sys', 'shutil', 'subprocess', 'pty', 'ctypes', 'socket'),
        *('importlib', 'runpy', 'code', 'codeop', 'marshal', 'pickle', '_pickle', 'cPickle'),
        *('bdb', 'pdb', 'timeit', 'profile', 'cProfile', 'pip', 'webbrowser', 'urllib', 'requests'),
    )
)
# and functions, some of which read another pickle; not `getattr`, which mmengine's logs and
# enums name, and which needs something forbidden to be of use
FORBIDDEN = frozenset(
    (
        *product(
            ('builtins', '__builtin__'),
            ('eval', 'exec', 'execfile', 'compile', '__import__', 'open', 'input', 'breakpoint'),
        ),
        *product(('torch', 'torch.serialization', 'numpy', 'joblib.numpy_pickle'), ('load',)),
        ('torch.storage', '_load_from_bytes'),
    )
)


class ForbiddenError(ValueError):
    """A pickle names what runs code where it is trusted."""


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
        """The allowed object of that name, or `Inert`.

        Raises:
            ForbiddenError: If it is one of those that run code.
        """
        if module.partition('.')[0] in FORBIDDEN_MODULES or (module, name) in FORBIDDEN:
            raise ForbiddenError(f'{module}.{name}')
        return ALLOWED.get((module, name), Inert)

    def _drop_state(self) -> None:
        self.stack.pop()

    dispatch[pickle.BUILD[0]] = _drop_state


def load(file: IO[bytes], **kwargs: Any) -> object:
    """As `pickle.load`."""
    return Unpickler(file, **kwargs).load()
