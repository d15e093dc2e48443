"""Checks in processes of their own, several at a time, results in order as soon as they are known.

Compiling takes nearly all of the time, and an illegal access on the GPU leaves a process unusable.
"""

import importlib
import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

# Errors of a case and what is allowed, or the exception that it raised, in a line.
Result = tuple[list[float], float] | str
# The name of the module that checks it, and the case.
Job = tuple[str, Any]
# What `check` says of a process that ended before it answered; as of any error of CUDA.
DIED = 'the process died, as of a fault in CUDA or for want of memory'


def check(job: Job) -> Result:
    """One case: its errors and what is allowed, or what went wrong."""
    module, case = job
    torch.manual_seed(0)
    try:
        return importlib.import_module(module).check(case)
    except Exception as e:  # whatever a compiler or driver may raise is this check's finding
        return f'{type(e).__name__}: {[*str(e).strip().splitlines(), ""][0][:100]}'


def prepare() -> None:
    """Settings of a process that checks."""
    # The float64 definitions are small, and there are as many processes as cores.
    torch.set_num_threads(1)
    # Fills new memory with NaN, so that what a kernel does not write is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)


class Processes:
    """Runs `check` on jobs, in `workers` processes at a time; a context that ends them."""

    def __init__(self, workers: int) -> None:
        # A thread waits for each process, and starts another where that one became unusable.
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._started: list[ProcessPoolExecutor] = []

    def __enter__(self) -> 'Processes':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._started:
            process.shutdown()

    def map(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Starts all jobs, in order; yields their results in order."""
        return self._threads.map(self._run, jobs)

    def _run(self, job: Job) -> Result:
        """A result; where CUDA failed, that of a fresh process, since others may have broken it."""
        used = hasattr(self._own, 'process')
        result = self._ask(job)
        if not _unusable(result):
            return result
        self._replace()
        if used:
            result = self._ask(job)
            if _unusable(result):
                self._replace()
        return result

    def _ask(self, job: Job) -> Result:
        if not hasattr(self._own, 'process'):
            spawn = multiprocessing.get_context('spawn')  # CUDA does not survive a fork
            self._own.process = ProcessPoolExecutor(1, spawn, initializer=prepare)
            self._started.append(self._own.process)
        try:
            return self._own.process.submit(check, job).result()
        except BrokenProcessPool:
            return DIED

    def _replace(self) -> None:
        self._own.process.shutdown(wait=False)
        del self._own.process


def _unusable(result: Result) -> bool:
    """Whether the process that returned this is of no more use."""
    return isinstance(result, str) and 'CUDA' in result
