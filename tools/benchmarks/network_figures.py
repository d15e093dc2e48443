"""Checks a network's forms against its eager float32 form, then measures time and memory."""

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.network_forms import Case, make_step
from benchmarks.networks import Network, make

# Largest ||x - y|| / ||y|| of an output map, and of all gradients together, y eager in float32.
TOLERANCE = {'float32': 1e-3, 'autocast': 5e-2, 'bfloat16': 1e-1}
# Gradients through sampled positions jump where a sample crosses a pixel.
GRADIENT_TOLERANCE = {'float32': 1e-2, 'autocast': 3e-1, 'bfloat16': 5e-1}
# Larger images are checked for finite outputs alone: attention in float32 takes too long there.
MAX_CHECKED_PIXELS = 1344 * 800
SECONDS = 0.4
GIB = 2**30


@dataclass
class Figures:
    """Milliseconds (median), peak GiB (allocated on a GPU, resident on a CPU), largest errors."""

    network: str
    case: Case
    ms: float = math.nan
    peak_gib: float = math.nan
    error: float = math.nan
    gradient_error: float = math.nan
    note: str = ''
    runs: list[float] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Images a second."""
        return 1e3 * self.case.batch / self.ms

    @property
    def ms_per_megapixel(self) -> float:
        """Milliseconds a million pixels of all images."""
        return 1e6 * self.ms / (self.case.batch * self.case.height * self.case.width)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        derived = dict(
            images_per_second=self.images_per_second, ms_per_megapixel=self.ms_per_megapixel
        )
        own = {k: v for k, v in asdict(self).items() if k not in ('case', 'runs')}
        row = {**own, **asdict(self.case), **derived}
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }


def measure(network: Network, case: Case, device: str) -> Figures:
    """Figures of a case; no time if an output is wrong, or it does not run (the note says why)."""
    figures = Figures(network.name, case)
    try:
        _measure(figures, network, case, device)
    except (RuntimeError, AssertionError) as error:  # no memory, cannot be compiled, wrong size
        first_line = (str(error).splitlines() or [''])[0]
        figures.note = f'{type(error).__name__}: {first_line[:120]}'
    finally:
        torch._dynamo.reset()
        _release(device)
    return figures


def _measure(figures: Figures, network: Network, case: Case, device: str) -> None:
    images = case.images(device)
    if case.height * case.width <= MAX_CHECKED_PIXELS:
        expected = _reference(network, case, device)
    else:
        expected = None
    _release(device)
    module = make(network, device)
    step = make_step(module, case, images, network.ours)
    for _ in range(3):  # compiles, records, replays
        outs = step()
    figures.note = _find_fault(figures, outs, module, expected, case)
    expected = outs = None
    if figures.note:
        return
    figures.runs = _time(step, device)
    figures.ms = statistics.median(figures.runs)
    if not case.form.endswith('graph'):  # a graph's memory lies in a pool that is not counted so
        figures.peak_gib = _peak(device)


def _reference(network: Network, case: Case, device: str) -> tuple[list[Tensor], Tensor | None]:
    """Outputs, and the gradients in one vector, of the eager network in float32."""
    plain = replace(case, form='eager', precision='float32')
    module = make(network, device)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    outs = make_step(module, plain, plain.images(device), network.ours)()
    torch.backends.cudnn.allow_tf32 = tf32
    return [out.detach() for out in outs], _gradients(module) if case.training else None


def _gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.float().flatten() for p in module.parameters() if p.grad is not None])


def _find_fault(
    figures: Figures,
    outs: tuple[Tensor, ...],
    module: nn.Module,
    expected: tuple[list[Tensor], Tensor | None] | None,
    case: Case,
) -> str:
    """What is wrong with outputs or gradients, in words; fills in the errors."""
    finite = [out.isfinite().all() for out in outs]
    if case.training:
        finite += [p.grad.isfinite().all() for p in module.parameters() if p.grad is not None]
    if not torch.stack(finite).all():
        return 'wrong: not finite'
    if expected is None:
        return ''
    figures.error = max(_error(x, y) for x, y in zip(outs, expected[0], strict=True))
    if not figures.error <= TOLERANCE[case.precision]:
        return f'wrong: error {figures.error:.1e} of an output'
    if case.training:
        figures.gradient_error = _error(_gradients(module), expected[1])
        if not figures.gradient_error <= GRADIENT_TOLERANCE[case.precision]:
            return f'wrong: error {figures.gradient_error:.1e} of the gradients'
    return ''


def _error(x: Tensor, y: Tensor) -> float:
    return ((x.float() - y.float()).norm() / y.float().norm()).item()


def _time(step: Callable[[], tuple], device: str) -> list[float]:
    """Milliseconds of single runs, one right after the other, for about half a second."""
    _reset_peak(device)
    start = time.perf_counter()
    step()
    _wait(device)
    count = max(5, min(100, round(SECONDS / (time.perf_counter() - start))))
    if device == 'cpu':
        return [_wall(step) for _ in range(min(count, 5))]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    return times[count // 5 :]


def _wall(step: Callable[[], tuple]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _wait(device: str) -> None:
    if device != 'cpu':
        torch.cuda.synchronize()


def _reset_peak(device: str) -> None:
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> float:
    if device == 'cpu':
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / GIB


def _release(device: str) -> None:
    gc.collect()
    if device != 'cpu':
        torch.cuda.empty_cache()
