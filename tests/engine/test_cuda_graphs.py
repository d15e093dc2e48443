"""CUDA graphs of inference: which calls replay one, and that replaying changes nothing."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmvig.engine import (
    CudaGraphHook,
    CudaGraphs,
    acceleration,
    compile_backbone,
    use_cuda_graphs,
)
from mmvig.engine.capture import conversion
from mmvig.engine.cuda_graphs import _Recording
from mmvig.models import ViTAdapter
from tests.models.test_vig import small_vig
from tests.models.test_vig_h import small_vig_h
from tests.models.test_vit_adapter import small_adapter


class Doubled(nn.Module):
    """Twice its input, by a weight; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.calls += 1
        return (self.weight * x,)


class FakeGraphs(CudaGraphs):
    """Records on the CPU, where a 'graph' calls the module and is noted down."""

    device_type = 'cpu'

    def __init__(self, module: nn.Module, max_graphs: int = 2) -> None:
        super().__init__(module, max_graphs)
        self.recorded: list[tuple[int, ...]] = []
        self.replayed = 0

    def _record(self, x: Tensor):
        self.recorded.append(tuple(x.shape))

        def replay(x: Tensor) -> tuple[Tensor, ...]:
            self.replayed += 1
            return self._function(x)

        return replay


@pytest.fixture
def graphs() -> FakeGraphs:
    return FakeGraphs(Doubled().eval())


def call(graphs: FakeGraphs, *sides: int) -> None:
    with torch.no_grad():
        for side in sides:
            assert torch.equal(graphs(torch.ones(side))[0], torch.full((side,), 2.0))


def test_a_size_is_recorded_at_its_second_call_and_replayed_from_then_on(graphs) -> None:
    call(graphs, 3, 4)
    assert graphs.recorded == []
    call(graphs, 3, 3, 4, 3)
    assert graphs.recorded == [(3,), (4,)]
    assert graphs.replayed == 4


def test_the_graph_used_longest_ago_goes(graphs) -> None:
    call(graphs, 3, 3, 4, 4, 3, 5, 5)  # 4 goes
    assert graphs.recorded == [(3,), (4,), (5,)]
    call(graphs, 3, 4)
    assert graphs.recorded == [(3,), (4,), (5,), (4,)]


def test_dtype_and_autocast_have_graphs_of_their_own(graphs) -> None:
    with torch.no_grad():
        for _ in range(2):
            graphs(torch.ones(3))
            graphs(torch.ones(3, dtype=torch.float64))
            with torch.autocast('cpu', torch.bfloat16):
                graphs(torch.ones(3))
    assert len(graphs.recorded) == 3


def test_gradients_and_training_mode_call_the_module(graphs) -> None:
    x = torch.ones(3)
    for _ in range(3):
        graphs(x)[0].sum().backward()
    graphs._module.train()
    call(graphs, 3, 3, 3)
    assert graphs.recorded == []


def test_weights_that_change_keep_the_graphs_and_weights_that_move_drop_them(graphs) -> None:
    call(graphs, 3, 3)
    with torch.no_grad():
        graphs._module.weight.copy_(2.0)
    call(graphs, 3)
    assert graphs.recorded == [(3,)]
    graphs._module.weight.data = graphs._module.weight.data.clone()
    call(graphs, 3)
    assert graphs.recorded == [(3,), (3,)]


def test_a_cpu_runs_as_before() -> None:
    module = Doubled().eval()
    graphs = use_cuda_graphs(module)
    with torch.no_grad():
        for _ in range(3):
            module(torch.ones(3))
    assert module.calls == 3
    assert not graphs._graphs
    graphs.remove()
    assert module._compiled_call_impl is None


def test_copies_and_checkpoints_know_nothing_of_graphs() -> None:
    module = small_adapter().eval()
    names = list(module.state_dict())
    use_cuda_graphs(module)
    assert list(module.state_dict()) == names
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(copied, ViTAdapter)
        assert copied._compiled_call_impl is None


@pytest.mark.parametrize('number', [0, 1.5, '4'])
def test_a_number_of_graphs_is_wanted(number: object) -> None:
    with pytest.raises(ValueError, match=f'an integer of at least 1, got {number!r}'):
        CudaGraphs(Doubled(), number)


def test_the_hook_finds_the_backbone_and_a_model_without_one_is_refused() -> None:
    model = nn.Module()
    runner = type('Runner', (), dict(model=model))
    with pytest.raises(ValueError, match='Module has no backbone'):
        CudaGraphHook().before_run(runner)
    model.backbone = Doubled()
    CudaGraphHook(max_graphs=3).before_run(runner)
    assert model.backbone._compiled_call_impl.max_graphs == 3


@pytest.mark.parametrize(
    ('distributed', 'setting', 'direct'),
    [(False, None, True), (True, None, False), (False, False, False), (True, True, True)],
)
def test_the_hook_adds_gradients_directly_in_one_process(
    distributed: bool, setting: bool | None, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, 'is_distributed', lambda: distributed)
    model = nn.Module()
    model.backbone = Doubled()
    hook = CudaGraphHook(training=True, direct_gradients=setting)
    hook.before_run(type('Runner', (), dict(model=model)))
    assert model.backbone._compiled_call_impl._direct is direct


@pytest.mark.parametrize('gpu', [False, True])
def test_the_hook_says_that_it_needs_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(acceleration, 'print_log', lambda message, **kwargs: said.append(message))
    model = nn.Module()
    model.backbone = Doubled()
    CudaGraphHook().before_run(type('Runner', (), dict(model=model)))
    assert ['no effect' in message for message in said] == ([] if gpu else [True])


def test_kept_weights_are_made_anew_before_a_replay() -> None:
    """And outputs are copies in their order."""

    class Noted:
        def __init__(self, call: str) -> None:
            setattr(self, call, lambda: calls.append(call))

    calls = []
    recording = object.__new__(_Recording)
    recording._convert = conversion(nn.Identity())
    recording._input, recording._outputs = torch.zeros(2), (torch.ones(2), torch.zeros(3))
    recording._kept, recording._graph = [Noted('refresh')], Noted('replay')
    outs = recording(torch.ones(2))
    assert calls == ['refresh', 'replay']
    for out, y in zip(outs, recording._outputs, strict=True):
        assert torch.equal(out, y) and out.data_ptr() != y.data_ptr()
    assert torch.equal(recording._input, torch.ones(2))


@pytest.mark.gpu
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
def test_replaying_changes_nothing(compiled: bool) -> None:
    """Also when sizes alternate in one memory pool, graphs come and go, and weights change."""
    # Compiling takes minutes, and more with four interactions, which are compiled one by one.
    fewer = dict(interaction_indexes=((0, 3),)) if compiled else {}
    model = small_adapter(norm_cfg=dict(type='BN'), **fewer).cuda().eval()
    sizes = [(64, 96), (96, 64), (64, 64)]
    images = [torch.randn(2, 3, *sizes[i % 3], device='cuda') for i in (0, 1, 0, 1, 0, 2, 2, 1, 0)]

    def run(xs: list[Tensor]) -> list[Tensor]:
        # a new context each, since autocast keeps cast weights until it ends
        with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
            return [out for x in xs for out in model(x)]

    expected = run(images)
    if compiled:
        compile_backbone(model, dynamic=True)
    graphs = use_cuda_graphs(model, max_graphs=2)
    outs = run(images)
    assert len(graphs._graphs) == 2
    # Compiled, modules run in place of fused kernels; bfloat16 on a CPU is 7e-3 from float32.
    limit = 2e-2 if compiled else 1e-2
    for out, y in zip(outs, expected, strict=True):
        assert (out - y).norm() / y.norm() < limit
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.9)
    changed = run(images[:1])
    graphs.remove()
    again = run(images[:1])
    for out, y, before in zip(changed, again, expected, strict=False):
        assert (out - y).norm() / y.norm() < limit
        assert (out - before).norm() / before.norm() > 1e-2


@pytest.mark.parametrize('build', [small_vig, small_vig_h, small_adapter])
def test_images_may_be_converted_before_the_backbone(build: Callable[..., nn.Module]) -> None:
    """Where they lie for a graph; outputs are the same to the bit."""
    module, x = build().eval(), torch.randn(2, 3, 72, 40)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = module(x)
        place = torch.empty_like(conversion(module)(x))
        assert place.dtype == torch.bfloat16
        assert place.is_contiguous(memory_format=torch.channels_last)
        assert conversion(module)(x, out=place) is place
        found = module(place)
    for out, y in zip(found, expected, strict=True):
        assert torch.equal(out, y) and out.stride() == y.stride()


def test_a_subclass_with_its_own_forward_gets_images_as_they_are() -> None:
    class Other(ViTAdapter):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().forward(x)

    module, x = small_adapter(), torch.randn(1, 3, 32, 32)
    assert conversion(module)(x).is_contiguous(memory_format=torch.channels_last)
    module.__class__ = Other
    assert conversion(module)(x) is x


def test_images_of_other_modules_stay_as_they_are() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    convert = conversion(nn.Conv2d(3, 4, 1))
    place = torch.empty_like(convert(x))
    assert place.stride() == x.stride()
    assert torch.equal(convert(x, out=place), x)
