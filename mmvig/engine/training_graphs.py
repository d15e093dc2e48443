"""A training step of a backbone as two CUDA graphs, forward and backward, of one image size."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from mmvig.engine.capture import Conversion, ready_to_capture, run_beside
from mmvig.models.layers.deform_attn import cached_levels

Maps = tuple[Tensor, ...]
Function = torch.autograd.function.FunctionCtx


class Turn:
    """One forward pass whose backward pass may still come; what both keep while they need memory.

    Graphs share memory, so only one such pass may be under way at a time.
    """


class SharedMemory:
    """Memory that all graphs of a module share: their pool, and buffers that outlive a replay.

    Graphs of several sizes have room in the memory of the largest where that one is recorded first.

    Attributes:
        pool: Of the graphs' own tensors, which the next replay of any graph overwrites.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._turn: weakref.ref[Turn] = weakref.ref(Turn())

    def is_in_use(self) -> bool:
        """Whether the backward pass of an earlier call may still come."""
        return self._turn() is not None

    def take_turn(self) -> Turn:
        """Marks the memory as in use for as long as what is returned lives."""
        turn = Turn()
        self._turn = weakref.ref(turn)
        return turn

    def holds(self, turn: Turn | None) -> bool:
        """Whether no later call has taken the memory."""
        return turn is not None and self._turn() is turn

    def flat_like(self, role: str, tensors: Sequence[Tensor]) -> Tensor:
        """One dimension with room for the tensors, in the buffer of that role.

        Raises:
            ValueError: If they are not of one dtype.
        """
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1:
            found = ', '.join(sorted(map(str, dtypes)))
            raise ValueError(f'CUDA graphs of training steps need {role} of one dtype, got {found}')
        (dtype,) = dtypes
        total = sum(t.numel() for t in tensors)
        buffer = self._buffers.get((role, dtype))
        if buffer is None or buffer.numel() < total:
            buffer = torch.empty(total, dtype=dtype, device=tensors[0].device)
            self._buffers[role, dtype] = buffer
        return buffer[:total]

    def like(self, role: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the same shapes, strides and dtype, in the buffer of that role."""
        flat = self.flat_like(role, tensors)
        places, start = [], 0
        for t in tensors:
            places.append(flat.as_strided(t.shape, t.stride(), start))
            start += t.numel()
        return places


class TrainingRecording:
    """Forward and backward of a module for one size of input, recorded.

    Outputs and gradients are copies in fresh memory. Random numbers differ at every replay, and
    buffers such as running means are updated by each. Outputs of frozen layers have no gradient,
    nor have parameters that no output depends on.

    Args:
        function: Takes one tensor and returns a tuple of tensors, of which one needs a gradient.
        x: The first input.
        module: What `function` calls: the parameters that need a gradient, and the buffers.
        memory: Shared with the other recordings of the module.
        convert: Makes of an input what `function` is called with; see `capture.conversion`.

    Attributes:
        params: The parameters that need a gradient.
        differentiable: Whether each output does.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Maps],
        x: Tensor,
        module: nn.Module,
        memory: SharedMemory,
        convert: Conversion,
    ) -> None:
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.memory = memory
        self._convert = convert
        (self._input,) = memory.like('image', [torch.empty_like(convert(x))])
        convert(x, out=self._input)
        self._grads = memory.flat_like('gradients of parameters', self.params)
        self._buffers = list(module.buffers())
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # a capture sees what its own thread launches
        with ready_to_capture(x.device), torch.autograd.set_multithreading_enabled(False):
            _warm_up(_Aliased(function, module), self._input, self._buffers)
            self._capture(_Aliased(function, module))
        self._tables = cached_levels()  # the graphs read them, whether they stay cached or not

    def _capture(self, step: '_Aliased') -> None:
        settings = dict(pool=self.memory.pool, capture_error_mode='thread_local')
        with torch.cuda.graph(self._forward, **settings):
            outs = step.forward(self._input)
            self._outs = self.memory.like('outputs', outs)
            torch._foreach_copy_(self._outs, [out.detach() for out in outs])
        self.differentiable = [out.requires_grad for out in outs]
        self._douts = self.memory.like('gradients of outputs', outs)
        with torch.cuda.graph(self._backward, **settings):
            grads = step.backward(outs, self._douts)
            self._reached = [grad is not None for grad in grads]
            self._trained = [
                p for p, grad in zip(self.params, grads, strict=True) if grad is not None
            ]
            # flat: with a single gradient in another layout PyTorch would copy one by one
            flat = [grad.contiguous().view(-1) for grad in grads if grad is not None]
            sizes = [grad.numel() for grad in flat]
            self._grads = self._grads[: sum(sizes)]
            torch._foreach_copy_(self._grads.split(sizes), flat)

    def forward(self, x: Tensor) -> Maps:
        """Replays the forward pass."""
        self._convert(x, out=self._input)
        self._forward.replay()
        for buffer in self._buffers:  # what is made of running means has to be made anew
            torch.autograd.graph.increment_version(buffer)
        return tuple(out.clone() for out in self._outs)

    def backward(self, douts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Replays the backward pass of the forward pass right before: gradients of `params`."""
        torch._foreach_copy_(self._douts, list(douts))
        self._backward.replay()
        # one copy and views of it, since a copy each would take the host longer than the replay
        grads = iter(_unflatten_dense_tensors(self._grads.clone(), self._trained))
        return [next(grads) if has else None for has in self._reached]


class _Aliased:
    """Both passes of a module with parameters that are new tensors in the old ones' memory.

    Autograd runs the last step of a parameter's gradient on the stream where that was needed first,
    which a capture of another stream may not touch; new tensors are needed first in the capture.
    """

    def __init__(self, function: Callable[[Tensor], Maps], module: nn.Module) -> None:
        self._caller = _Caller(function, module)
        self._aliases = {
            name: param.detach().requires_grad_()
            for name, param in self._caller.named_parameters()
            if param.requires_grad
        }

    def forward(self, x: Tensor) -> Maps:
        return torch.func.functional_call(self._caller, self._aliases, (x,))

    def backward(self, outs: Maps, douts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        pairs = [(out, d) for out, d in zip(outs, douts, strict=True) if out.requires_grad]
        outs, douts = zip(*pairs, strict=True)
        return torch.autograd.grad(outs, list(self._aliases.values()), douts, allow_unused=True)


class _Caller(nn.Module):
    """Calls a function that has a module's parameters, as a module with the same."""

    def __init__(self, function: Callable[[Tensor], Maps], module: nn.Module) -> None:
        super().__init__()
        self._function, self._module = function, module

    def forward(self, x: Tensor) -> Maps:
        return self._function(x)


def _warm_up(step: _Aliased, x: Tensor, buffers: list[Tensor]) -> None:
    """Runs both passes once beside the current stream; leaves buffers as they were."""
    before = [b.clone() for b in buffers]

    def both_passes() -> None:
        outs = step.forward(x)
        step.backward(outs, [torch.zeros_like(out) for out in outs])

    run_beside(both_passes)
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def replay(recording: TrainingRecording, x: Tensor, direct_gradients: bool = False) -> Maps:
    """The outputs for x, whose backward pass reaches the module's parameters.

    Args:
        recording: Of a module.
        x: The input.
        direct_gradients: Whether the backward pass adds to `.grad` itself where that is all that
            autograd would do: parameters have no hooks, and lie in memory in the usual order.
    """
    if direct_gradients and all(map(_only_accumulates, recording.params)):
        # on the device, so that autograd has other streams wait for this backward pass
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        return _Replayed.apply(recording, x, True, anchor)
    return _Replayed.apply(recording, x, False, *recording.params)


def _only_accumulates(param: nn.Parameter) -> bool:
    hooks = param._backward_hooks or param._post_accumulate_grad_hooks
    return not hooks and param.is_contiguous()


def _accumulate(params: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    """Adds to the gradients of parameters, as a node of autograd for each would."""
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            continue
        if param.grad is None:
            param.grad = grad
        else:
            param.grad += grad


class _Replayed(torch.autograd.Function):
    """Both passes as one node of the graph.

    Gradients go to the parameters as they always do, through a node each, or directly, which takes
    the host a third of that time.
    """

    @staticmethod
    def forward(
        ctx: Function, recording: TrainingRecording, x: Tensor, direct: bool, *params: Tensor
    ) -> Maps:
        ctx.recording, ctx.direct = recording, direct
        ctx.turn = recording.memory.take_turn()
        outs = recording.forward(x)
        kinds = zip(outs, recording.differentiable, strict=True)
        ctx.mark_non_differentiable(*(out for out, differentiable in kinds if not differentiable))
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Function, *douts: Tensor) -> tuple:
        if not ctx.recording.memory.holds(ctx.turn):
            raise RuntimeError(
                'a training step that runs as CUDA graphs has one backward pass, before the next '
                'forward pass: take CudaGraphHook(training=True) or --cuda-graph away'
            )
        grads = ctx.recording.backward(douts)
        ctx.turn = None
        if ctx.direct:
            _accumulate(ctx.recording.params, grads)
            grads = (torch.empty(0, device=douts[0].device),)
        return (None, None, None, *grads)
