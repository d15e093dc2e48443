"""What recording a CUDA graph of a module takes, in inference and in training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ready_to_capture(device: torch.device) -> Iterator[None]:
    """The device, and autocast as it is but without its cache.

    Autocast keeps cast weights until it ends; they must not come from elsewhere into a graph, where
    they would outlive it, nor go from the graph, which only records, elsewhere.
    """
    enabled, dtype = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    with torch.cuda.device(device), torch.autocast('cuda', dtype, enabled, cache_enabled=False):
        yield


def run_beside(function: Callable[[], object]) -> None:
    """Runs a function once on a stream of its own, as a capture will, and waits for it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
