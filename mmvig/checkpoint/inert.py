"""A stand-in for `pickle` that rebuilds tensors and plain containers, and executes nothing else.

`torch.load` takes this module as its `pickle_module`. What a training checkpoint holds beside its
weights (a config object, an optimizer's, a logger's) becomes `Inert`: its class is neither imported
nor called, and its state is dropped. `weights_only=True` would refuse the whole file instead.

A file that names what is known to run code (`mmvig.checkpoint.harmful`) is refused. It could not
run it here either way: the refusal is a warning before the file is loaded by other means.
"""

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from typing import IO, Any

import torch

from mmvig.checkpoint.harmful import is_harmful


class Refusal(ValueError):
    """Says why a file is refused, in words that go on after its name."""


class Inert:
    """Stands for any other class, function or object, takes all that a pickle does to one."""

    dump_patches = False  # torch.load asks classes of modules in files of the old format

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


def spell(module: str, name: str) -> str:
    """A name from a file, fit for a message: short, in one line, without control characters."""
    return ascii(f'{module}.{name}'[:100])[1:-1]


def _stand_in(module: str, name: str) -> type[Inert]:
    """A kind of `Inert` for what a file names, and by that name.

    Raises:
        Refusal: If that is known to run code.
    """
    if is_harmful(module, name):
        raise Refusal(
            f'names {spell(module, name)}, which can run code or change files where it is loaded '
            'as a pickle; it is refused, and nothing in it was executed: get the weights from a '
            'source that you trust, best as safetensors, and open this file in a sandbox only'
        )
    return type('Inert', (Inert,), dict(__module__=module, __qualname__=name))


def _attribute(owner: object, name: object, *default: object) -> type[Inert]:
    """Stands for `getattr`, with which pickles name methods."""
    named = owner if hasattr(owner, '__qualname__') else type(owner)
    return _stand_in(named.__module__, f'{named.__qualname__}.{name}')


# the only objects that a file may name; storages are added by `torch.load`, as mere data types
ALLOWED = {
    ('builtins', 'getattr'): _attribute,
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch', 'Size'): torch.Size,
    ('torch._utils', '_rebuild_parameter'): torch._utils._rebuild_parameter,
    ('torch._utils', '_rebuild_tensor'): torch._utils._rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v2'): torch._utils._rebuild_tensor_v2,
}


class Unpickler(pickle._Unpickler):
    """Unpickler that imports nothing, calls what `ALLOWED` lists, and sets no attributes.

    The class in Python, not the one in C: there, a file could still set attributes of the allowed
    functions and classes.

    Args:
        file: What is read.
        foreign: Takes the names of what `Inert` stands for.
        kwargs: As of `pickle.Unpickler`.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes], *, foreign: set[str], **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self._foreign = foreign

    def find_class(self, module: str, name: str) -> object:
        """The allowed object of that name, or a kind of `Inert`.

        Raises:
            Refusal: If the name is known to run code.
        """
        if self.proto < 3:  # as pickle does: Python 2's names
            module, name = NAME_MAPPING.get((module, name), (module, name))
            module = IMPORT_MAPPING.get(module, module)
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        found = _stand_in(module, name)
        self._foreign.add(spell(module, name))
        return found

    def _drop_state(self) -> None:
        self.stack.pop()

    dispatch[pickle.BUILD[0]] = _drop_state


def load(file: IO[bytes], **kwargs: Any) -> object:
    """As `pickle.load`; keyword arguments are those of `Unpickler`."""
    return Unpickler(file, **kwargs).load()
