"""Runs a model on tensors that have shapes and no values, so that any size takes seconds.

The tensors claim to lie on a GPU, whether there is one or not: the model takes the same path as on
one, and the fused operators stay whole.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

DEVICE = 'cuda'


class ShapeRun(TorchDispatchMode):
    """While active, operators compute shapes alone; `observe` is told of each.

    Values that depend on no image, such as the sizes of feature maps that detectors keep in
    tensors and read back, are computed as usual. A mask that depends on one selects nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._values = WeakTensorKeyDictionary()
        self._shapes = _ShapesAsTensors()

    def observe(self, op: Any, args: tuple, out: Any) -> None:
        """Called after each operator on tensors without values; to be overridden."""

    def copy_of(self, model: nn.Module) -> nn.Module:
        """A copy of a model in evaluation mode; its parameters have no values and no gradients."""
        with self._fake:
            blank = {
                id(t): nn.Parameter(torch.empty_like(t, device=DEVICE), requires_grad=False)
                for t in (*model.parameters(), *model.buffers())
            }
        return copy.deepcopy(model, blank).eval()

    def blank(self, *shape: int) -> Tensor:
        """A float32 tensor without values."""
        with self._fake:
            return torch.empty(*shape, device=DEVICE)

    def __enter__(self) -> 'ShapeRun':
        self._fake.__enter__()
        self._shapes.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._shapes.__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(
        self, op: Any, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if op.namespace == 'prim':  # questions about a tensor, such as for its device
            return op(*args, **kwargs)
        if tensors and all(self._has_value(t) for t in tensors):
            return self._run_with_values(op, args, kwargs)
        if op is torch.ops.aten.nonzero.default:
            return torch.empty(0, args[0].dim(), dtype=torch.long, device=DEVICE)
        if not tensors and any(a.name == 'device' for a in op._schema.arguments):
            kwargs = dict(kwargs, device=DEVICE)
        args, kwargs = tree_map_only(Tensor, _fake, (args, kwargs))
        out = op(*args, **kwargs)
        self.observe(op, args, out)
        return out

    def _run_with_values(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """Runs an operator on values that are all known, on the CPU."""
        fakes = {}

        def value(x: Tensor) -> Tensor:
            found = self._values.get(x, x)
            fakes[id(found)] = x
            return found

        args, kwargs = tree_map_only(Tensor, value, (args, kwargs))
        if 'device' in kwargs:
            kwargs = dict(kwargs, device='cpu')
        with unset_fake_temporarily():
            out = op(*args, **kwargs)
        # an operator in place returns its argument
        return tree_map_only(
            Tensor, lambda x: fakes[id(x)] if id(x) in fakes else self._known(x), out
        )

    def _has_value(self, x: Tensor) -> bool:
        return not isinstance(x, FakeTensor) or x in self._values

    def _known(self, value: Tensor) -> Tensor:
        """A tensor whose value can be read although it claims to lie on the device."""
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
        self._values[fake] = value
        return fake


class _ShapesAsTensors(TorchFunctionMode):
    """Mends `torch._shape_as_tensor`, which writes to memory that blank tensors do not have."""

    def __torch_function__(
        self, function: Any, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch._shape_as_tensor:
            return torch.tensor(args[0].shape)
        return function(*args, **(kwargs or {}))


def _fake(x: Tensor) -> Tensor:
    """The tensor on the device of all others; numbers (0 dims) may lie on any."""
    if isinstance(x, FakeTensor) or x.dim() == 0:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
