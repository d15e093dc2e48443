"""Inference as a CUDA graph: one launch a forward in place of several hundred."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from mmvig.models.layers.deform_attn import cached_levels

Maps = tuple[Tensor, ...]


def use_cuda_graphs(backbone: nn.Module, max_graphs: int = 16) -> 'CudaGraphs':
    """Has a backbone replay CUDA graphs in inference from its next call on.

    Where it is compiled, what is recorded is the compiled form. The weights' names stay, and copies
    of the backbone are without graphs.

    Args:
        backbone: Takes an image batch and returns a tuple of maps.
        max_graphs: Sizes whose graphs are kept; see `CudaGraphs`.

    Returns:
        The graphs; their `remove()` takes them away again.
    """
    graphs = CudaGraphs(backbone, max_graphs)
    # what Module.compile() sets: called in place of forward, and left out of copies and pickles
    backbone._compiled_call_impl = graphs
    return graphs


class CudaGraphs:
    """Calls a module, and from the second call with an input of the same size on replays a graph.

    With gradients, in training mode, on another device than a GPU, or inside another graph the
    module is called as usual. A graph belongs to size and dtype of the input and to autocast's
    state; it reads the weights where they are, so that steps of an optimizer and loaded checkpoints
    are seen, and all graphs are dropped when weights move. Outputs are copies: they stay as they
    are when the next image comes.

    All graphs share one memory pool, which holds the activations of the largest input, beside the
    outputs of each.

    Args:
        module: Takes one tensor and returns a tuple of tensors; draws no random numbers and decides
            nothing by values on the GPU.
        max_graphs: Of how many sizes graphs are kept, those used last.

    Raises:
        ValueError: If no graph could be kept.
    """

    device_type = 'cuda'

    def __init__(self, module: nn.Module, max_graphs: int = 16) -> None:
        if max_graphs < 1:
            raise ValueError(f'max_graphs must be at least 1, got {max_graphs}')
        self.max_graphs = max_graphs
        self._module = module
        self._before = module._compiled_call_impl
        self._function = self._before or module._call_impl
        self._weights = [*module.parameters(), *module.buffers()]
        self._places: list[int] = []
        self._seen: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, Callable[[Tensor], Maps]] = OrderedDict()
        self._pool: object = None

    def __call__(self, x: Tensor) -> Maps:
        """The module's output for x."""
        if not self._applies(x):
            return self._function(x)
        self._drop_if_weights_moved()
        key = self._key(x)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif key in self._seen:
            self._graphs[key] = self._record(x)
            while len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
        else:
            self._seen.add(key)  # this call compiles kernels, and warms up caches and allocator
            return self._function(x)
        return self._graphs[key](x)

    def remove(self) -> None:
        """Has the module run as before."""
        self._module._compiled_call_impl = self._before

    def _applies(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._module.training:
            return False
        if x.device.type != self.device_type:
            return False
        return not (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def _key(self, x: Tensor) -> Hashable:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (x.shape, x.dtype, x.device, autocast)

    def _drop_if_weights_moved(self) -> None:
        places = [weight.data_ptr() for weight in self._weights]
        if places != self._places:
            self._graphs.clear()
            self._places = places

    def _record(self, x: Tensor) -> Callable[[Tensor], Maps]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return _Recording(self._function, x, self._pool)


class _Recording:
    """One graph, with the memory that it reads and writes."""

    def __init__(self, function: Callable[[Tensor], Maps], x: Tensor, pool: object) -> None:
        self._input = x.clone()
        enabled, dtype = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
        self._graph = torch.cuda.CUDAGraph()
        # Autocast keeps cast weights until it ends; they must not come from elsewhere into the
        # graph, where they would outlive it, nor go from the graph, which only records, elsewhere.
        with (
            torch.cuda.device(x.device),
            torch.autocast('cuda', dtype, enabled, cache_enabled=False),
        ):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function(self._input)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode='thread_local'):
                self._outputs = function(self._input)
        self._tables = cached_levels()  # the graph reads them, whether they stay cached or not

    def __call__(self, x: Tensor) -> Maps:
        self._input.copy_(x)
        self._graph.replay()
        return tuple(out.clone() for out in self._outputs)
