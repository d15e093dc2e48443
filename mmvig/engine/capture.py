"""What recording a CUDA graph of a module takes, in inference and in training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Conversion = Callable[..., Tensor]


@contextmanager
def ready_to_capture(device: torch.device) -> Iterator[None]:
    """The device, and autocast as it is but without its cache.

    Autocast keeps cast weights until it ends; they must not come from elsewhere into a graph, where
    they would outlive it, nor go from the graph, which only records, elsewhere.
    """
    enabled, dtype = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    with torch.cuda.device(device), torch.autocast('cuda', dtype, enabled, cache_enabled=False):
        yield


def conversion(module: nn.Module) -> Conversion:
    """What a graph's memory for inputs is made by, of an input x and, later, that memory as `out`.

    A module with a method `convert_image(x, out=None)` has its images converted on the way there,
    which then costs no pass of its own; the module has to take them in either form. A subclass
    that has a `forward` of its own has to say so anew.
    """
    classes = type(module).__mro__
    own = next((i for i, c in enumerate(classes) if 'convert_image' in vars(c)), len(classes))
    forward = next(i for i, c in enumerate(classes) if 'forward' in vars(c))
    return module.convert_image if own <= forward else unchanged


def unchanged(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The conversion that is none."""
    return x if out is None else out.copy_(x)


def run_beside(function: Callable[[], object]) -> None:
    """Runs a function once on a stream of its own, as a capture will, and waits for it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
