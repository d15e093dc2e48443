"""CUDA graphs of training steps: which calls replay one, and that replaying changes nothing."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmvig.engine import CudaGraphs, cuda_graphs, training_graphs, use_cuda_graphs
from mmvig.engine.capture import conversion
from mmvig.engine.training_graphs import SharedMemory, TrainingRecording, _Aliased
from mmvig.models.layers.deform_attn import MAX_LEVELS, make_levels
from tests.models.test_vig import small_vig
from tests.models.test_vig_h import small_vig_h
from tests.models.test_vit_adapter import small_adapter


class Net(nn.Module):
    """x by a weight, plus another that may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(1.0))
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.weight * x, self.weight * x + self.bias


class PartlyFrozen(nn.Module):
    """Has an output without a gradient, and a parameter that none depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1).requires_grad_(False)
        self.second = nn.Conv2d(8, 8, 3, 2, 1)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return x, self.second(x)


class FakeRecording:
    """What a recording does, by calls of the module."""

    def __init__(
        self, function: Callable, x: Tensor, module: nn.Module, memory: SharedMemory, *_: Callable
    ) -> None:
        self.module, self.memory = module, memory
        self.params = [p for p in module.parameters() if p.requires_grad]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            self._outs = self.module.forward(x)
        self.differentiable = [out.requires_grad for out in self._outs]
        return tuple(out.detach() for out in self._outs)

    def backward(self, douts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _Aliased.backward(self, self._outs, douts)

    @property
    def _aliases(self) -> dict[int, nn.Parameter]:
        return dict(enumerate(self.params))


class FakeGraphs(CudaGraphs):
    """Records on the CPU; notes the sizes of what it records."""

    device_type = 'cpu'

    def __init__(self, module: nn.Module, training: bool = True, direct: bool = False) -> None:
        super().__init__(module, 8, training, direct_gradients=direct)
        self.recorded: list[int] = []

    def _record_training(self, x: Tensor) -> Callable:
        self.recorded.append(x.numel())
        return super()._record_training(x)


@pytest.fixture(params=[False, True], ids=['through autograd', 'direct'])
def graphs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeGraphs:
    monkeypatch.setattr(cuda_graphs, 'TrainingRecording', FakeRecording)
    return FakeGraphs(Net(), direct=request.param)


def step(graphs: FakeGraphs, side: int = 3) -> dict[str, float | None]:
    """Gradients of one training step; those of the module without graphs are side and 2 * side."""
    graphs._module.zero_grad()
    first, second = graphs(torch.ones(side))
    (first.sum() + second.sum()).backward()
    return {n: p.grad and p.grad.item() for n, p in graphs._module.named_parameters()}


def test_steps_are_recorded_at_the_second_call_with_a_size(graphs) -> None:
    for _ in range(3):
        assert step(graphs) == {'weight': 6.0, 'bias': 3.0}
        assert step(graphs, 2) == {'weight': 4.0, 'bias': 2.0}
    assert graphs.recorded == [3, 2]


def test_outputs_of_frozen_layers_and_unused_parameters(graphs) -> None:
    graphs._module.weight.requires_grad_(False)
    graphs._module.unused = nn.Parameter(torch.tensor(3.0))
    for _ in range(3):
        assert step(graphs) == {'weight': None, 'bias': 3.0, 'unused': None}
    first, second = graphs(torch.ones(3))
    assert (first.requires_grad, second.requires_grad) == (False, True)
    assert graphs.recorded == [3]


def test_a_frozen_module_is_not_recorded(graphs) -> None:
    graphs._module.requires_grad_(False)
    for _ in range(3):
        assert not graphs(torch.ones(3))[0].requires_grad
    assert graphs.recorded == []


def test_a_larger_size_drops_the_graphs_of_smaller_ones(graphs) -> None:
    """So that all of them share the memory of the largest."""
    for side in (2, 2, 3, 3, 2, 3):
        step(graphs, side)
    assert graphs.recorded == [2, 3, 2]


def test_statistics_over_processes_are_not_recorded(
    graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs._module.norm = nn.SyncBatchNorm(1)
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    for _ in range(3):
        step(graphs)
    assert graphs.recorded == []


def test_without_being_asked_training_is_not_recorded() -> None:
    graphs = FakeGraphs(Net(), training=False)
    for _ in range(3):
        step(graphs)
    assert graphs.recorded == []


def test_gradients_add_up_over_steps(graphs) -> None:
    step(graphs)
    step(graphs)
    outs = graphs(torch.ones(3))
    sum(out.sum() for out in outs).backward()
    assert graphs._module.weight.grad == 12.0


def nodes(graphs: FakeGraphs) -> int:
    """How many parameters have a node of autograd behind the outputs."""
    node = graphs(torch.ones(3))[0].grad_fn
    leaves = [leaf.variable for leaf, _ in node.next_functions if leaf is not None]
    return sum(any(leaf is p for leaf in leaves) for p in graphs._module.parameters())


def test_direct_gradients_take_no_node_a_parameter(graphs) -> None:
    step(graphs)
    step(graphs)
    assert nodes(graphs) == (0 if graphs._direct else 2)


@pytest.mark.parametrize('register', ['register_hook', 'register_post_accumulate_grad_hook'])
def test_parameters_with_hooks_get_their_gradients_through_autograd(graphs, register: str) -> None:
    step(graphs)
    step(graphs)
    getattr(graphs._module.weight, register)(lambda _: None)
    assert nodes(graphs) == 2


def test_parameters_in_another_order_in_memory_have_such_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, 'TrainingRecording', FakeRecording)
    conv = PartlyFrozen().to(memory_format=torch.channels_last)
    graphs = FakeGraphs(conv, direct=True)
    for _ in range(3):
        conv.zero_grad()
        graphs(torch.ones(1, 3, 16, 16))[1].sum().backward()
    assert conv.second.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_an_output_that_is_not_used_counts_nothing(graphs) -> None:
    step(graphs)
    step(graphs)
    graphs._module.zero_grad()
    graphs(torch.ones(3))[0].sum().backward()
    assert graphs._module.weight.grad == 3.0
    assert graphs._module.bias.grad == 0.0


def test_a_second_forward_pass_before_the_backward_pass_is_as_usual(graphs) -> None:
    step(graphs)
    step(graphs)
    first = graphs(torch.ones(3))
    calls = graphs._module.calls
    second = graphs(torch.full((3,), 2.0))
    assert graphs._module.calls == calls + 1
    graphs._module.zero_grad()
    (first[0].sum() + second[0].sum()).backward()
    assert graphs._module.weight.grad == 9.0


def test_a_forward_pass_whose_outputs_are_gone_keeps_nothing(graphs) -> None:
    step(graphs)
    step(graphs)
    graphs(torch.ones(3))
    assert not graphs._memory.is_in_use()


def test_a_second_backward_pass_is_refused(graphs) -> None:
    step(graphs)
    step(graphs)
    loss = graphs(torch.ones(3))[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='one backward pass'):
        loss.backward()


def test_gradients_of_the_image_are_as_usual(graphs) -> None:
    step(graphs)
    step(graphs)
    x = torch.ones(3, requires_grad=True)
    graphs(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_freezing_a_weight_records_anew(graphs) -> None:
    step(graphs)
    step(graphs)
    graphs._module.bias.requires_grad_(False)
    assert step(graphs) == {'weight': 6.0, 'bias': None}
    assert graphs.recorded == [3, 3]


def test_a_module_that_recomputes_is_refused() -> None:
    adapter = small_adapter()
    adapter.trunk.with_cp = True
    with pytest.raises(ValueError, match='trunk.with_cp of the backbone is True'):
        use_cuda_graphs(adapter, training=True)
    use_cuda_graphs(adapter).remove()


def test_buffers_of_one_role_are_shared_and_of_one_dtype() -> None:
    memory = SharedMemory()
    maps = [torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.empty(7)]
    first = memory.like('outputs', maps)
    assert [t.shape for t in first] == [t.shape for t in maps]
    assert [t.stride() for t in first] == [t.stride() for t in maps]
    assert memory.like('outputs', maps[1:])[0].data_ptr() == first[0].data_ptr()
    assert memory.like('others', maps[1:])[0].data_ptr() != first[0].data_ptr()
    with pytest.raises(ValueError, match='outputs of one dtype, got torch.float16, torch.float32'):
        memory.like('outputs', [torch.empty(1), torch.empty(1).half()])


def test_what_is_recorded_computes_the_gradients_of_the_weights() -> None:
    """With other tensors in their place, which a functional call puts there and takes away."""
    model = small_adapter(norm_cfg=dict(type='BN'))
    x = torch.randn(1, 3, 64, 64)
    outs = model(x)
    douts = [torch.randn_like(out) for out in outs]
    params = dict(model.named_parameters())
    expected = torch.autograd.grad(outs, list(params.values()), douts)
    step = _Aliased(model.forward, model)
    found = step.backward(step.forward(x), douts)
    for name, grad, y in zip(params, found, expected, strict=True):
        assert torch.allclose(grad, y, rtol=1e-4, atol=1e-5), name
    assert dict(model.named_parameters()) == params


def test_a_recording_keeps_the_tables_that_its_graphs_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of later images push them out of the cache, and their memory would be used again."""
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', object)
    monkeypatch.setattr(training_graphs, 'ready_to_capture', lambda device: nullcontext())
    monkeypatch.setattr(training_graphs, '_warm_up', lambda *args: None)
    monkeypatch.setattr(TrainingRecording, '_capture', lambda self, step: None)
    table = weakref.ref(make_levels([(3, 5)], torch.device('cpu')))
    args = (None, torch.ones(3), Net(), SharedMemory())
    recording = TrainingRecording(*args, lambda x, out=None: x)
    for side in range(1, MAX_LEVELS + 1):
        make_levels([(side, 7)], torch.device('cpu'))
    assert table() is not None
    del recording
    assert table() is None


def test_a_replay_counts_as_a_change_of_the_buffers() -> None:
    recording = TrainingRecording.__new__(TrainingRecording)
    recording._input, recording._outs, recording._buffers = torch.zeros(3), [], [torch.zeros(2)]
    recording._convert = conversion(nn.Identity())
    recording._forward = nn.Identity()
    recording._forward.replay = lambda: None
    recording.forward(torch.ones(3))
    assert recording._buffers[0]._version == 1


def training_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after a step under autocast."""
    model.zero_grad()
    with torch.autocast('cuda', torch.bfloat16, enabled=dtype == torch.bfloat16):
        outs = model(x)
    # no sum of squares, which is the same for all that a norm returns, its gradient all rounding
    weights = [
        torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape) for out in outs
    ]
    sum((out.float() * w).sum() for out, w in zip(outs, weights, strict=True)).backward()
    found = {f'output {i}': out.detach().float() for i, out in enumerate(outs)}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found['gradients'] = torch.cat([g.flatten() for g in grads.values()])
    if dtype == torch.float32:
        # Some biases come before a batch norm and have no gradient but rounding: a share of all.
        least = 1e-3 * found['gradients'].norm()
        found |= {n: torch.cat([g.flatten(), least[None]]) for n, g in grads.items()}
    return found | {n: b.float().clone() for n, b in model.named_buffers()}


# Batch norm over a few pixels, in training, enlarges rounding: under autocast on a CPU, the image
# times 1 + 1e-6 changes the adapter's outputs by 1.2e-2 and its gradients by 8e-2, those of one
# parameter by up to 0.3.
TOLERANCE = {torch.float32: dict(default=2e-3), torch.bfloat16: dict(default=5e-2, gradients=0.2)}


@pytest.mark.gpu
@pytest.mark.parametrize('direct', [False, True], ids=['through autograd', 'direct'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(
    'build',
    [
        partial(small_adapter, norm_cfg=dict(type='BN')),
        small_vig,
        small_vig_h,
        PartlyFrozen,
    ],
    ids=['adapter', 'ViG', 'ViG-H', 'partly frozen'],
)
def test_replaying_changes_nothing(
    build: Callable[[], nn.Module],
    dtype: torch.dtype,
    direct: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when sizes alternate, a larger one comes late, and an optimizer changes the weights."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    models = [build().cuda().train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    graphs = use_cuda_graphs(models[1], training=True, direct_gradients=direct)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in models]
    sizes = [(64, 96), (96, 64), (128, 96)]
    for size in (0, 1, 0, 1, 0, 2, 2, 1, 1, 0, 0, 2):
        x = torch.randn(2, 3, *sizes[size], device='cuda')
        expected, found = (training_step(model, x, dtype) for model in models)
        for name, y in expected.items():
            error = (found[name] - y).norm() / y.norm().clamp(min=1e-6)
            limits = TOLERANCE[dtype]
            assert error < limits.get(name, limits['default']), (name, size)
        for optimizer in optimizers:
            optimizer.step()
        models[1].load_state_dict(models[0].state_dict())  # so that no difference grows
    assert len(graphs._graphs) == 3


@pytest.mark.gpu
def test_random_numbers_are_drawn_anew_at_every_replay() -> None:
    model = small_vig(drop_path_rate=0.5).cuda().train()
    use_cuda_graphs(model, training=True)
    x = torch.randn(8, 3, 64, 64, device='cuda')
    outs = [training_step(model, x, torch.bfloat16)['output 0'] for _ in range(4)]
    assert not torch.equal(outs[2], outs[3])
