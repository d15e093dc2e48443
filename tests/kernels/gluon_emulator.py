"""Runs kernels in Gluon on the CPU: their source, on tensors of PyTorch, in float32.

A test of arithmetic and of order, not of layouts. Shared memory, which starts as NaN, is read and
written as late as the source allows: copies arrive when they are waited for, asynchronous products
read their operands in shared memory then. So a kernel that reads a tile before it waited, or writes
one that a product in flight needs, computes something else. Warps and barriers are not emulated.

It stands in for `triton.experimental.gluon` while kernels are imported, whatever Triton there is,
and knows as much of it as they use.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

GLUON = 'triton.experimental.gluon'
Mask = Tensor | bool | None


class Machine:
    """What a program has in flight, and where in the grid it is."""

    program = programs = 0
    copies: list[Callable[[], None]] = []
    groups: list[list[Callable[[], None]]] = []
    products: list['Product'] = []


class Pointer:
    """An address: elements past the start of a tensor, whose strides do not matter."""

    def __init__(self, memory: Tensor, at: Tensor | int = 0) -> None:
        self.memory = memory
        self.at = torch.as_tensor(at)

    def __add__(self, offset: Tensor | int) -> 'Pointer':
        return Pointer(self.memory, self.at + offset)


def point(x: object) -> object:
    """A pointer to a tensor's first element; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return Pointer(torch.as_strided(x, (size,), (1,), x.storage_offset()))


def load(p: Pointer, mask: Mask = None) -> Tensor:
    """What is there, zeros where masked."""
    if mask is None:
        return p.memory[p.at]
    at, mask = torch.broadcast_tensors(p.at, torch.as_tensor(mask))
    return torch.where(mask, p.memory[at.where(mask, 0)], 0.0)


def store(p: Pointer, x: Tensor, mask: Mask = None) -> None:
    """Writes where it is not masked."""
    mask = torch.as_tensor(True if mask is None else mask)
    at, mask, x = torch.broadcast_tensors(p.at, mask, torch.as_tensor(x))
    p.memory[at[mask]] = x[mask].to(p.memory.dtype)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def load(self, layout: None) -> Tensor:
        return self.x.clone()

    def store(self, x: Tensor) -> None:
        assert x.shape == self.x.shape
        self.x.copy_(x)

    def index(self, i: Tensor | int) -> 'Shared':
        return Shared(self.x[int(i)])

    def permute(self, dims: tuple[int, int]) -> 'Shared':
        return Shared(self.x.permute(dims))


class Product:
    """An asynchronous product, of which there is no value before it was waited for."""

    def __init__(self, a: Tensor | Shared, b: Shared, c: 'Tensor | Product | int') -> None:
        self.operands = a, b, c
        self.value: Tensor | None = None

    def finish(self) -> None:
        a, b, c = (x.x if isinstance(x, Shared) else x for x in self.operands)
        self.value = a @ b + (c.value if isinstance(c, Product) else c)


def multiply(
    a: Tensor | Shared, b: Shared, c: Tensor | Product, use_acc: bool = True, is_async: bool = False
) -> Product:
    """a b + c, or a b; in flight."""
    assert is_async and isinstance(b, Shared)
    Machine.products.append(Product(a, b, c if use_acc else 0))
    return Machine.products[-1]


def wait_products(left: int, deps: Sequence[Product]) -> Tensor | tuple[Tensor, ...]:
    """Ends all products, in order; the values of `deps`."""
    assert left == 0
    for product in Machine.products:
        product.finish()
    Machine.products = []
    values = tuple(product.value for product in deps)
    return values if len(values) > 1 else values[0]


def copy(to: Shared, p: Pointer, mask: Mask = None) -> None:
    """Starts a copy, which arrives when its group is waited for."""
    Machine.copies.append(lambda: to.store(load(p, mask)))


def commit_copies() -> None:
    """Makes a group of the copies since the last one."""
    Machine.groups.append(Machine.copies)
    Machine.copies = []


def wait_copies(left: int) -> None:
    """Has all groups but the last `left` arrive."""
    while len(Machine.groups) > left:
        for arrive in Machine.groups.pop(0):
            arrive()


class Function:
    """A function in Gluon: called by another one, or launched over a grid."""

    def __init__(self, source: Callable) -> None:
        self.source = source

    def __call__(self, *args: object) -> object:
        return self.source(*args)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self._launch, grid[0])

    def _launch(
        self,
        programs: int,
        *args: object,
        num_warps: int,
        maxnreg: int | None = None,
        **constants: object,
    ) -> None:
        Machine.programs = programs
        for program in range(programs):
            Machine.program = program
            self.source(*(point(x) for x in args), **constants)
            wait_copies(0)
            assert not Machine.products and not Machine.copies


class NoKernel:
    """Stands for a kernel that is to do nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def jit(source: Callable | None = None, do_not_specialize: Sequence[str] = ()) -> Callable:
    """`gluon.jit`, with arguments or without."""
    return Function(source) if source else Function


def _layout(*args: object, **kwargs: object) -> None:
    """Layouts are not emulated."""


def _both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: function(torch.as_tensor(x), torch.as_tensor(y))


LANGUAGE = dict(
    constexpr=lambda x: x,
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
    bfloat16=torch.float32,
    NVMMADistributedLayout=_layout,
    NVMMASharedLayout=_layout,
    DotOperandLayout=_layout,
    BlockedLayout=_layout,
    SliceLayout=_layout,
    arange=lambda start, end, layout: torch.arange(start, end),
    zeros=lambda shape, dtype, layout: torch.zeros(shape),
    full=lambda shape, value, dtype, layout: torch.full(shape, value),
    allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.full(shape, torch.nan)),
    convert_layout=lambda x, layout: x,
    inline_asm_elementwise=lambda asm, constraints, args, dtype, is_pure, pack: (*args, None)[0],
    program_id=lambda axis: torch.tensor(Machine.program),
    num_programs=lambda axis: torch.tensor(Machine.programs),
    static_range=range,
    to_tensor=torch.as_tensor,
    thread_barrier=lambda: None,
    load=load,
    store=store,
    exp2=torch.exp2,
    minimum=_both(torch.minimum),
    where=lambda mask, x, y: torch.where(torch.as_tensor(mask), x, y),
    min=lambda x, axis: x.amin(axis),
)
HOPPER = dict(
    async_copy=SimpleNamespace(
        async_copy_global_to_shared=copy, commit_group=commit_copies, wait_group=wait_copies
    ),
    fence_async_shared=lambda: None,
    warpgroup_mma=multiply,
    warpgroup_mma_wait=wait_products,
)


def emulated_modules() -> dict[str, ModuleType]:
    """Gluon's modules as far as kernels import them."""
    contents = {
        'triton.experimental': {},
        GLUON: dict(jit=jit),
        f'{GLUON}.language': LANGUAGE,
        f'{GLUON}.language.nvidia': {},
        f'{GLUON}.language.nvidia.hopper': HOPPER,
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name])
        parent, _, child = name.rpartition('.')
        if parent in modules:
            setattr(modules[parent], child, module)
    return modules


def emulated(*names: str) -> list[ModuleType]:
    """Imports modules anew, each after those it needs, with Gluon emulated; leaves no trace."""
    own = [*emulated_modules(), *names]
    others = {n: m for n, m in sys.modules.items() if n in own or n.startswith(GLUON)}
    for name in others:
        del sys.modules[name]
    sys.modules.update(emulated_modules())
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(others)
