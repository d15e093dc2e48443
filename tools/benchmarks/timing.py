"""Measures contenders on a GPU: eager, under CUDA graphs, memory; never without a check."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import triton.testing
from torch import Tensor

GIB = 2**30


@dataclass
class Contender:
    """One implementation of a case.

    `run` is the forward, of differentiable `inputs`, to a tensor or a tuple of them; `errors`
    compares the output and the gradients of the inputs, for a gradient of the output, with a
    reference, and returns an error each, relative, to be at most `tolerance`.
    """

    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    errors: Callable[..., list[float]]
    tolerance: float


@dataclass
class Figures:
    """Microseconds, MiB beyond the inputs, and the largest error; None where it did not run."""

    case: str
    contender: str
    forward_eager: float | None = None
    forward_graph: float | None = None
    both_eager: float | None = None
    both_graph: float | None = None
    forward_mib: float | None = None
    both_mib: float | None = None
    error: float | None = None
    note: str = ''

    @property
    def backward_graph(self) -> float | None:
        """Of forward and backward, what the forward does not take."""
        if self.both_graph is None or self.forward_graph is None:
            return None
        return self.both_graph - self.forward_graph

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def copy_bandwidth() -> float:
    """Bytes a second that a copy within the device's memory moves, read and written."""
    source = torch.empty(GIB, dtype=torch.int8, device='cuda')
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode='median')
    return 2 * GIB / milliseconds * 1e3


def measure(case: str, contender: Contender) -> Figures:
    """All figures of a contender; none but the error if that is over its tolerance."""
    figures = Figures(case, contender.name)
    try:
        out = contender.run(*contender.inputs)
        if isinstance(out, tuple):
            grad = tuple(torch.randn_like(x) for x in out)
            result = tuple(x.detach() for x in out)
        else:
            grad, result = torch.randn_like(out), out.detach()
        grads = torch.autograd.grad(out, contender.inputs, grad)
        figures.error = max(contender.errors(result, grads, grad))
        del out, result, grads
        if not figures.error <= contender.tolerance:
            figures.note = f'wrong: error over {contender.tolerance}'
            return figures
        _time(figures, contender, grad)
    except (RuntimeError, ImportError) as e:  # a back end that refuses the case, or no memory
        figures.note = f'{type(e).__name__}: {str(e).splitlines()[0][:80]}'
    return figures


def _time(figures: Figures, contender: Contender, grad: Tensor | tuple[Tensor, ...]) -> None:
    """Fills in times and memory."""

    def forward() -> None:
        with torch.no_grad():
            contender.run(*contender.inputs)

    def both() -> None:
        torch.autograd.grad(contender.run(*contender.inputs), contender.inputs, grad)

    figures.forward_eager, figures.both_eager = _median(forward), _median(both)
    figures.forward_mib, figures.both_mib = _memory(forward), _memory(both)
    figures.forward_graph, figures.both_graph = _median_graph(forward), _median_graph(both)


def _median(function: Callable[[], None]) -> float:
    """Median microseconds, with the L2 cache cleared before each run."""
    return 1e3 * triton.testing.do_bench(function, warmup=10, rep=60, return_mode='median')


def _median_graph(function: Callable[[], None]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return _median(graph.replay)


def _memory(function: Callable[[], None]) -> float:
    """Peak MiB allocated beyond what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
