"""A backbone as CUDA graphs: one launch a pass in place of several hundred."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor, nn

from mmvig.engine.capture import (
    Conversion,
    conversion,
    ready_to_capture,
    run_beside,
    unchanged,
)
from mmvig.engine.training_graphs import SharedMemory, TrainingRecording, replay
from mmvig.models.layers.deform_attn import cached_levels
from mmvig.models.layers.kept import recording
from mmvig.models.layers.norm import synchronizes

Maps = tuple[Tensor, ...]


def use_cuda_graphs(
    backbone: nn.Module,
    max_graphs: int = 16,
    training: bool = False,
    direct_gradients: bool = False,
) -> 'CudaGraphs':
    """Has a backbone replay CUDA graphs from its next call on.

    Where it is compiled, what is recorded is the compiled form. The weights' names stay, and copies
    of the backbone are without graphs.

    Args:
        backbone: Takes an image batch and returns a tuple of maps.
        max_graphs: Sizes whose graphs are kept; see `CudaGraphs`.
        training: Whether training steps are recorded, too, and not inference alone.
        direct_gradients: As of `CudaGraphs`.

    Returns:
        The graphs; their `remove()` takes them away again.

    Raises:
        ValueError: If no graph could be kept, or the backbone recomputes activations.
    """
    graphs = CudaGraphs(backbone, max_graphs, training, direct_gradients)
    # what Module.compile() sets: called in place of forward, and left out of copies and pickles
    backbone._compiled_call_impl = graphs
    return graphs


class CudaGraphs:
    """Calls a module, and from the second call with an input of the same size on replays a graph.

    In evaluation mode without gradients that is one graph. If `training`, training mode with
    gradients has two, forward and backward, and the gradients come out as those of one node; hooks
    inside the module do not run, and each forward pass has at most one backward pass, before the
    next one: where that may still come, a call is as usual. All other calls are as usual: on
    another device than a GPU, inside another graph, with gradients of the image, and in training
    with batch norm that is synchronized between processes.

    A graph belongs to size and dtype of the input and to autocast's state; it reads the weights
    where they are, so that steps of an optimizer and loaded checkpoints are seen, and all graphs
    are dropped when weights move, are frozen or thawed. Outputs and gradients are copies: they stay
    as they are when the next image comes.

    The graphs of inference share one memory pool, which holds the activations of the largest input,
    beside the outputs of each; those of training share another, with all that they have. A training
    input larger than those before drops their graphs, so that they are recorded in its memory.

    Args:
        module: Takes one tensor and returns a tuple of tensors; decides nothing by values on the
            GPU, and in inference draws no random numbers.
        max_graphs: Of how many sizes graphs are kept, those used last.
        training: Whether training steps are recorded, too.
        direct_gradients: Whether a backward pass adds gradients to the parameters' `.grad` itself,
            not through autograd's nodes, which take the host milliseconds. For training with
            `loss.backward()` in one process: `torch.autograd.grad` does not see the parameters, and
            `DistributedDataParallel` not their gradients. Those with hooks get theirs as usual.

    Raises:
        ValueError: If no graph could be kept, or if training steps were to be recorded of a module
            that recomputes activations (`with_cp`), which a graph cannot hold.
    """

    device_type = 'cuda'

    def __init__(
        self,
        module: nn.Module,
        max_graphs: int = 16,
        training: bool = False,
        direct_gradients: bool = False,
    ) -> None:
        if not isinstance(max_graphs, int) or max_graphs < 1:
            raise ValueError(f'max_graphs must be an integer of at least 1, got {max_graphs!r}')
        if training:
            _refuse_recomputation(module)
        self.max_graphs = max_graphs
        self._training, self._direct = training, direct_gradients
        self._module = module
        self._before = module._compiled_call_impl
        self._function = self._before or module._call_impl
        # what is compiled would be compiled once more for images in another form
        self._convert = unchanged if self._before else conversion(module)
        self._weights = [*module.parameters(), *module.buffers()]
        self._places: list[tuple[int, bool]] = []
        self._seen: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, Callable[[Tensor], Maps]] = OrderedDict()
        self._pool: object = None
        self._memory = SharedMemory()
        self._largest = 0

    def __call__(self, x: Tensor) -> Maps:
        """The module's output for x."""
        if not self._applies(x):
            return self._function(x)
        self._drop_if_weights_changed()
        key = self._key(x)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif key in self._seen:
            self._graphs[key] = self._record_training(x) if self._trains() else self._record(x)
            while len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
        else:
            self._seen.add(key)  # this call compiles kernels, and warms up caches and allocator
            return self._function(x)
        return self._graphs[key](x)

    def remove(self) -> None:
        """Has the module run as before."""
        self._module._compiled_call_impl = self._before

    def _trains(self) -> bool:
        return torch.is_grad_enabled()

    def _applies(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or x.device.type != self.device_type:
            return False
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if not self._trains():
            return not self._module.training
        return (
            self._training
            and self._module.training
            and not x.requires_grad
            and any(p.requires_grad for p in self._module.parameters())
            and not self._memory.is_in_use()
            and not any(synchronizes(part) for part in self._module.modules())
        )

    def _key(self, x: Tensor) -> Hashable:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (x.shape, x.dtype, x.device, autocast, self._trains())

    def _drop_if_weights_changed(self) -> None:
        places = [(weight.data_ptr(), weight.requires_grad) for weight in self._weights]
        if places != self._places:
            self._graphs.clear()
            self._places = places

    def _record(self, x: Tensor) -> Callable[[Tensor], Maps]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return _Recording(self._function, x, self._pool, self._convert)

    def _record_training(self, x: Tensor) -> Callable[[Tensor], Maps]:
        if x.numel() > self._largest:
            self._largest = x.numel()
            for key in [key for key in self._graphs if key[-1]]:
                del self._graphs[key]
            self._memory = SharedMemory()
        args = (self._function, x, self._module, self._memory, self._convert)
        recording = TrainingRecording(*args)
        return partial(replay, recording, direct_gradients=self._direct)


def _refuse_recomputation(module: nn.Module) -> None:
    """Raises ValueError if the module, or a part of it, has `with_cp` set."""
    for name, part in module.named_modules():
        if vars(part).get('with_cp'):
            where = f'{name}.with_cp' if name else 'with_cp'
            raise ValueError(
                f'{where} of the backbone is True: CUDA graphs of training steps keep what is '
                'needed for the backward pass; set it to False, or record inference alone'
            )


class _Recording:
    """One graph, with the memory that it reads and writes."""

    def __init__(
        self, function: Callable[[Tensor], Maps], x: Tensor, pool: object, convert: Conversion
    ) -> None:
        self._convert, self._input = convert, convert(x).clone()
        self._graph = torch.cuda.CUDAGraph()
        with ready_to_capture(x.device):
            run_beside(lambda: function(self._input))
            with (
                recording() as self._kept,
                torch.cuda.graph(self._graph, pool=pool, capture_error_mode='thread_local'),
            ):
                self._outputs = function(self._input)
        self._tables = cached_levels()  # the graph reads them, whether they stay cached or not

    def __call__(self, x: Tensor) -> Maps:
        self._convert(x, out=self._input)
        for made in self._kept:  # weights that were cast before the capture
            made.refresh()
        self._graph.replay()
        # from the last, which the caches still hold
        return tuple([out.clone() for out in reversed(self._outputs)][::-1])
