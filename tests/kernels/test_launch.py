"""Kernels that are launched again are those that were compiled for such arguments."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip('triton')
tl = triton.language

from mmvig.kernels import launch, reference, swiglu_kernels  # noqa: E402
from mmvig.kernels.launch import Kernel, kernel  # noqa: E402

from .interpreter import GPU  # noqa: E402


class OnGpu:
    """In place of a tensor on a GPU."""

    is_cuda = True

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.data_ptr, self.x = x.dtype, x.data_ptr, x

    @classmethod
    def zeros(cls, n: int, dtype: torch.dtype = torch.float32) -> 'OnGpu':
        return cls(torch.zeros(n, dtype=dtype))


class Jitted:
    """In place of Triton's function of a kernel (p_x, M, C, eps, BM, BC); notes what happens."""

    arg_names = ('p_x', 'M', 'C', 'eps', 'BM', 'BC')

    function, packed_metadata = 'function', 'metadata'

    def __init__(self) -> None:
        self.compiled, self.launched = [], []

    def __getitem__(self, grid: tuple) -> object:
        def compile_and_launch(*args: object, **constants: object) -> 'Jitted':
            self.compiled.append((grid, args, constants))
            return self

        return compile_and_launch

    def run(self, *args: object) -> None:
        self.launched.append(args)


@pytest.fixture
def jitted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Jitted]:
    current = SimpleNamespace(device=0, backend='cuda', arch=90, driver=13000)
    active = SimpleNamespace(
        get_current_device=lambda: current.device,
        get_current_stream=lambda device: 70 + device,
        get_current_target=lambda: current,
    )
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    monkeypatch.setattr(launch, 'triton', SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(launch, 'TENSORS', (Tensor, OnGpu))
    monkeypatch.setattr(launch, 'driver_version', lambda: current.driver)
    jitted = Jitted()
    jitted.current = current
    yield jitted


def test_a_second_launch_skips_triton(jitted: Jitted) -> None:
    function, x = Kernel(jitted, ['M']), OnGpu.zeros(32)
    function[(5,)](x, 7, 16, 1e-6, BM=2, BC=64, num_warps=4)
    function[6, 2](x, 9, 16, 1e-5, BM=2, BC=64, num_warps=4)
    assert jitted.compiled == [((5,), (x, 7, 16, 1e-6), dict(BM=2, BC=64, num_warps=4))]
    launched = (6, 2, 1, 70, 'function', 'metadata', None, None, None)
    assert jitted.launched == [(*launched, x.data_ptr(), 9, 16, 1e-5, 2, 64)]


@pytest.mark.parametrize(
    'change',
    [
        dict(dtype=torch.float16),
        dict(dtype=None),
        dict(c=32),
        dict(eps=1),
        dict(bc=128),
        dict(num_warps=8),
        dict(device=1),
    ],
    ids=str,
)
def test_other_arguments_are_compiled_anew(jitted: Jitted, change: dict) -> None:
    function = Kernel(jitted, ['M'])
    base = dict(dtype=torch.float32, c=16, eps=1e-6, bc=64, num_warps=4, device=0)
    for a in (base, base | change, base, base | change):
        jitted.current.device = a['device']
        x = None if a['dtype'] is None else OnGpu.zeros(32, a['dtype'])
        function[(5,)](x, 7, a['c'], a['eps'], BM=2, BC=a['bc'], num_warps=a['num_warps'])
    assert len(jitted.compiled) == 2 and len(jitted.launched) == 2


def test_many_arguments_do_not_fill_the_memory(
    jitted: Jitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, 'MAX_COMPILED', 3)
    function, x = Kernel(jitted, ['M']), OnGpu.zeros(32)
    for c in (1, 2, 3, 4, 4):
        function[(5,)](x, 7, c, 1e-6, BM=2, BC=64)
        assert len(function._compiled) <= 3
    assert len(jitted.compiled) == 4 and len(jitted.launched) == 1


def test_what_triton_compiles_otherwise_is_left_to_it(jitted: Jitted) -> None:
    function, x = Kernel(jitted, ['M']), OnGpu.zeros(33)
    constants = dict(BM=2, BC=64)
    function[(5,)](x, 7, 16, 1e-6, **constants)
    for other in ((OnGpu(x.x[1:]), 7), (x.x, 7), (x, 2**31)):
        for _ in range(2):
            function[(5,)](*other, 16, 1e-6, **constants)
    assert len(jitted.compiled) == 7 and not jitted.launched
    jitted.current.backend = 'hip'
    for _ in range(2):
        function[(5,)](x, 7, 48, 1e-6, **constants)
    assert len(jitted.compiled) == 9 and not jitted.launched


@pytest.mark.parametrize('hook', [print, SimpleNamespace(calls=[print])])
def test_a_profiler_sees_every_launch(
    jitted: Jitted, hook: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, 'HOOKS', SimpleNamespace(launch_enter_hook=hook))
    for _ in range(2):
        Kernel(jitted, ['M'])[(5,)](OnGpu.zeros(32), 7, 16, 1e-6, BM=2, BC=64)
    assert len(jitted.compiled) == 2 and not jitted.launched


@pytest.mark.parametrize(
    ('waits', 'backend', 'arch', 'driver', 'overlaps'),
    [
        (True, 'cuda', 90, 12030, True),
        (True, 'cuda', 90, 12020, False),
        (True, 'cuda', 80, 13000, False),
        (True, 'hip', 'gfx950', 0, False),
        (False, 'cuda', 90, 13000, False),
    ],
)
def test_kernels_that_wait_may_be_launched_early_where_a_gpu_can(
    jitted: Jitted, waits: bool, backend: str, arch: object, driver: int, overlaps: bool
) -> None:
    vars(jitted.current).update(backend=backend, arch=arch, driver=driver)
    function = Kernel(jitted, ['M'], waits)
    for x in (OnGpu.zeros(32), OnGpu(torch.zeros(33)[1:])):  # the second is left to Triton
        function[(5,)](x, 7, 16, 1e-6, BM=2, BC=64)
    for _, _, constants in jitted.compiled:
        assert constants == dict(BM=2, BC=64) | (dict(launch_pdl=True) if overlaps else {})


def test_without_a_driver_nothing_is_launched_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(launch.ctypes, 'CDLL', missing)
    assert launch.driver_version.__wrapped__() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
def test_the_driver_has_a_version() -> None:
    assert launch.driver_version() >= 11000


def test_kernels_wait_before_all_else() -> None:
    """In their first statement, all of them: one that waits late might read too early."""
    count = 0
    for path in Path(launch.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = getattr(node, 'decorator_list', [])
            if any(ast.unparse(d).startswith(('kernel(', 'launch.kernel(')) for d in decorators):
                first = node.body[1]  # after the docstring
                assert ast.unparse(first) == 'await_previous()', (path.name, node.name)
                count += 1
    assert count > 40


def test_sizes_are_arguments() -> None:
    with pytest.raises(ValueError, match="add has no argument 'N'"):

        @kernel(sizes=['M', 'N'])
        def add(p_x, M):
            pass


def test_other_versions_of_triton_launch_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(p_x, M):
        pass

    kinds = []
    for version in (launch.VERSIONS[-1] + '0', '3.3.1', '3.40.0', '4.0.0'):
        monkeypatch.setattr(launch.triton, '__version__', version)
        kinds.append(type(kernel(sizes=['M'])(add)))
    assert kinds == [Kernel] + 3 * [triton.runtime.JITFunction]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
def test_launches_give_the_same_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels compiled before, for other sizes, and of Triton's own launches."""
    if not triton.__version__.startswith(launch.VERSIONS):
        pytest.skip('all launches are those of this Triton')
    monkeypatch.setattr(swiglu_kernels.swiglu_kernel, '_compiled', {})

    def check(x: Tensor) -> None:
        out = swiglu_kernels.forward(x)
        torch.testing.assert_close(out.double(), reference.swiglu(x.double()), rtol=1e-2, atol=1e-2)

    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 16, 33, 4096):
            check(torch.randn(rows, 192, device='cuda', dtype=dtype))
            check(torch.randn(rows, 193, device='cuda', dtype=dtype)[:, 1:])  # not aligned
            check(torch.randn(rows, 192, device='cuda', dtype=dtype, requires_grad=True).detach())
    assert len(swiglu_kernels.swiglu_kernel._compiled) == 2
