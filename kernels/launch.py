"""The decorator of kernels that are launched: `triton.jit` with launches that cost less.

The host: Triton looks at every argument of every launch to find what it has compiled, which takes
twice as long as the launch itself; a training step of ViG-T and its adapter has some 600.

The device: a kernel that begins with `await_previous()` is launched as the last programs of the one
before it end, and waits on the multiprocessors until its results are in memory (programmatic
dependent launch, Hopper and newer), instead of being launched when they are.
"""

import ctypes
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor, nn
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

try:
    from triton.language.extra.cuda import gdc_wait
    from triton.language.target_info import cuda_capability_geq
except ImportError:  # an older Triton
    gdc_wait = cuda_capability_geq = None

TENSORS = (Tensor, nn.Parameter)
ALIGNMENT = 16  # bytes; Triton compiles wide loads for pointers that have it
INT32 = 31  # bits of the integers that are passed as such
MAX_COMPILED = 1024  # entries of a kernel; strides change with images, too
# Triton's whose compiled kernels are launched as below; in others it does so itself
VERSIONS = ('3.4.', '3.5.', '3.6.', '3.7.', '3.8.')
# where a profiler leaves what has to be called at every launch
HOOKS = triton.knobs.runtime if hasattr(triton, 'knobs') else None
HOPPER = 90  # compute capability
DRIVER = 12030  # of CUDA 12.3, from which on CUDA graphs record launches that overlap


@triton.jit
def await_previous():
    """Waits for the kernels before, whose results and memory the rest of this one may touch.

    The first statement of a kernel that may be launched before they are done. No kernel lets the
    next one start before its own programs have ended: those that wait take shared memory and L1
    cache from those at work, which costs more than it gains.
    """
    if CAN_WAIT and cuda_capability_geq(9):
        gdc_wait()


CAN_WAIT = tl.constexpr(isinstance(await_previous, JITFunction) and cuda_capability_geq is not None)


def kernel(*, sizes: Sequence[str] = (), jit: Callable = triton.jit) -> Callable[[Callable], Any]:
    """A decorator for kernels, launched as any of Triton's: `kernel[grid](*args, **constants)`.

    Constants that go by keyword have the same order in every call.

    Args:
        sizes: Integer arguments that change with images and batches. What is compiled fits all
            their values, where Triton would compile anew for 1 and for multiples of 16.
        jit: `triton.jit` or Gluon's.

    Raises:
        ValueError: If the kernel has no such argument.
    """

    def decorate(function: Callable) -> Any:
        for name in sizes:
            if name not in inspect.signature(function).parameters:
                raise ValueError(f'{function.__name__} has no argument {name!r}')
        jitted = jit(do_not_specialize=list(sizes))(function)
        if not isinstance(jitted, JITFunction) or not triton.__version__.startswith(VERSIONS):
            return jitted  # interpreted, emulated, or of another Triton
        return Kernel(jitted, sizes, waits=await_previous.__name__ in function.__code__.co_names)

    return decorate


@lru_cache
def driver_version() -> int:
    """What CUDA the driver is of, 1000 times the major and 10 times the minor version; or 0."""
    version = ctypes.c_int(0)
    try:  # loaded already wherever there is a GPU
        ctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


class Kernel:
    """A kernel, with what Triton has compiled of it by all that it was compiled for.

    Those are the device, dtypes, constants, and integers other than sizes. Left to Triton are
    tensors that are not aligned or on the CPU, which it refuses, sizes from 2^31 up, and launches
    that a profiler wants to see.

    Args:
        jitted: Triton's function.
        sizes: As of `kernel`.
        waits: Whether it begins with `await_previous()`.
    """

    def __init__(self, jitted: JITFunction, sizes: Sequence[str], waits: bool = False) -> None:
        self.jitted = jitted
        self._waits = waits
        self._is_size = [name in sizes for name in jitted.arg_names]
        self._compiled: dict[tuple, tuple[CompiledKernel, tuple]] = {}  # and the constants

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """The launch on a grid."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key, values = [device, *constants.values()], []
        addresses, integers, on_gpu = 0, 0, True
        for arg, is_size in zip(args, self._is_size, strict=False):
            if type(arg) in TENSORS:
                key.append(arg.dtype)
                on_gpu = on_gpu and arg.is_cuda
                arg = arg.data_ptr()
                addresses |= arg
            elif is_size:
                integers |= arg
            else:  # a float is never compiled for its value
                key.append(float if type(arg) is float else arg)
            values.append(arg)
        hook = HOOKS.launch_enter_hook
        usual = on_gpu and not (addresses % ALIGNMENT or integers >> INT32)
        if not usual or getattr(hook, 'calls', hook):
            self.jitted[grid](*args, **constants, **self._options())
            return
        key = tuple(key)
        if key in self._compiled:
            compiled, rest = self._compiled[key]
            compiled.run(
                *(*grid, 1, 1)[:3], driver.get_current_stream(device), compiled.function,
                compiled.packed_metadata, None, None, None, *values, *rest,
            )  # fmt: skip
            return
        compiled = self.jitted[grid](*args, **constants, **self._options())
        if driver.get_current_target().backend == 'cuda':  # others compile for more than the above
            if len(self._compiled) >= MAX_COMPILED:
                self._compiled.clear()
            self._compiled[key] = compiled, self._rest(args, constants)

    def _options(self) -> dict[str, bool]:
        target = triton.runtime.driver.active.get_current_target()
        overlaps = self._waits and target.backend == 'cuda' and target.arch >= HOPPER
        return dict(launch_pdl=True) if overlaps and driver_version() >= DRIVER else {}

    def _rest(self, args: tuple, constants: dict[str, Any]) -> tuple:
        """Values of the arguments after `args`, in order."""
        names = self.jitted.arg_names[len(args) :]
        return tuple(constants[name] for name in names)
