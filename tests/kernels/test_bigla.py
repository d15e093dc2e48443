"""The public `bidirectional_gla`: arguments, dispatch, and life among PyTorch's features."""

import importlib.util
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmvig.kernels import bidirectional_gla, bigla, bigla_chunked, bigla_trust, reference

from .interpreter import run_interpreted

NAMES = ('q', 'k', 'v', 'log_gate_fwd', 'log_gate_bwd')


def make_inputs(tokens: int = 50, device: str = 'cpu', dtype=torch.float32) -> list[Tensor]:
    """q, k, v and both gates, leaves of 32 key and 64 value channels."""
    q, k = torch.randn(2, 2, tokens, 3, 32, device=device)
    v = torch.randn(2, tokens, 3, 64, device=device)
    gates = F.logsigmoid(torch.randn(2, 2, tokens, 3, 32, device=device)) / 16
    return [x.to(dtype).requires_grad_() for x in (q, k, v, *gates)]


def grads_of(function, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    weights = torch.sin(torch.arange(out.numel(), device=out.device, dtype=torch.float32))
    return [out, *torch.autograd.grad((out.float() * weights.view_as(out)).sum(), inputs)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        error = ((x.double() - y.double()).norm() / y.double().norm()).item()
        assert error < tolerance, f'{i}: {error:.2e}'


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs Triton')
def test_kernels_under_the_interpreter() -> None:
    """Runs `test_bigla_kernels.py` in a process where Triton is not yet imported."""
    run_interpreted(Path(__file__).with_name('test_bigla_kernels.py'))


def test_matches_the_definition_on_the_cpu() -> None:
    inputs = make_inputs(70)
    expected = reference.bidirectional_gla(*(x.double() for x in inputs))
    torch.testing.assert_close(bidirectional_gla(*inputs).double(), expected, rtol=1e-4, atol=1e-5)


def test_scale_is_a_factor() -> None:
    inputs = make_inputs(20)
    actual = bidirectional_gla(*inputs, scale=-0.5)
    torch.testing.assert_close(actual, bidirectional_gla(*inputs) * -0.5 * 32**0.5)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'k': lambda x: x[..., :16]}, 'k .* must have the shape of q'),
        ({'v': lambda x: x[:, 1:]}, r'v .* must share \(B, N, H\) with q'),
        ({'log_gate_bwd': lambda x: x[:1]}, 'log_gate_bwd .* must have the shape of q'),
        ({'q': lambda x: x[0]}, r'must be \(B, N, H, D\)'),
        ({'v': lambda x: x.half()}, 'must share a dtype'),
        ({'log_gate_fwd': lambda x: x.int()}, 'log_gate_fwd must be of a floating dtype'),
    ],
)
def test_says_what_does_not_fit(change: dict, message: str) -> None:
    inputs = dict(zip(NAMES, make_inputs(10), strict=True))
    for name, function in change.items():
        inputs[name] = function(inputs[name].detach())
    with pytest.raises(ValueError, match=message):
        bidirectional_gla(**inputs)


def test_autocast_casts_all_but_the_gates() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        out = bidirectional_gla(*make_inputs(10))
    assert out.dtype == torch.bfloat16


def test_no_tokens() -> None:
    assert bidirectional_gla(*(x[:0] for x in make_inputs(10))).shape == (0, 10, 3, 64)


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPU's eager way on the CPU, PyTorch in the launchers' place; a record of their calls."""
    calls = []

    def forward(*args) -> Tensor:
        calls.append('forward')
        assert all(x.stride(-1) == 1 for x in args[:5])
        return bigla_chunked.bidirectional_gla(*args)

    def backward(*args, into: None) -> tuple[Tensor, ...]:
        calls.append('backward')
        assert all(x.stride(-1) == 1 for x in args[:6])
        return bigla.chunked_backward(*args)

    for name, function in (('bigla_fwd', forward), ('bigla_bwd', backward)):
        module = types.SimpleNamespace(**{function.__name__: function})
        monkeypatch.setitem(sys.modules, f'mmvig.kernels.{name}', module)
    monkeypatch.setattr(bigla, '_has_trusted_kernel', lambda *args: True)
    return calls


def test_eager_calls_launch_the_kernels(launchers: list[str]) -> None:
    inputs = make_inputs(30)
    inputs[1] = inputs[1].detach().mT.contiguous().mT.requires_grad_()
    actual = grads_of(bidirectional_gla, inputs)
    assert launchers == ['forward', 'backward']
    assert_close(actual, grads_of(bigla_chunked.bidirectional_gla, inputs), 1e-5)


def test_eager_calls_are_differentiable_once(launchers: list[str]) -> None:
    inputs = make_inputs(10)
    out = bidirectional_gla(*inputs)
    (dq,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='differentiable once'):
        dq.sum().backward()


def test_kernels_that_fail_their_check_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('triton')
    monkeypatch.setattr(bigla_trust, '_warned', set())
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    kind = (torch.device('cuda'), torch.bfloat16, 32, 64)
    with pytest.warns(
        RuntimeWarning, match='key dim 32, value dim 64 .error of dq; a GPU'
    ) as record:
        for fault in ('error of dq', 'error of dk'):
            bigla_trust._warn_once(*kind, fault)
    assert len(record) == 1


def registered_operator(*inputs: Tensor, scale: float) -> Tensor:
    return torch.ops.mmvig.bidirectional_gla(*inputs, scale)


def test_the_plain_forms_results_are_contiguous_in_the_registered_operator() -> None:
    inputs = make_inputs(60)
    actual = grads_of(partial(registered_operator, scale=32**-0.5), inputs)
    assert all(x.is_contiguous() for x in actual)
    assert_close(actual, grads_of(bidirectional_gla, inputs), 1e-5)


class Refusing(TorchDispatchMode):
    """No operator may run under it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise RuntimeError('a mode of the caller')


def test_the_self_check_runs_outside_the_modes_of_its_caller() -> None:
    """A compiled graph has one during its first call, which torch.func does not work under."""

    def measure(args: list[Tensor], chunks: int) -> dict[str, float]:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        torch.func.vjp(torch.sin, args[0])
        return {'o': 0.0}

    args = (measure, torch.device('cpu'), torch.float32, torch.float32, 16, 16)
    with Refusing(), torch.inference_mode():
        assert bigla_trust.search_fault(*args) is None


# From here on: on a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_operator_matches_the_pytorch_path(dtype: torch.dtype) -> None:
    inputs = make_inputs(300, 'cuda', dtype)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        actual = grads_of(bidirectional_gla, inputs)
    assert_close(actual, grads_of(bigla_chunked.bidirectional_gla, inputs), 1.5e-2)


@pytest.mark.gpu
def test_opcheck() -> None:
    args = (*make_inputs(40, 'cuda'), 0.2)
    torch.library.opcheck(torch.ops.mmvig.bidirectional_gla.default, args)


@pytest.mark.gpu
def test_compiles_once_for_all_sizes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend('inductor')
    compiled = torch.compile(bidirectional_gla, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (100, 333, 1000):
        inputs = make_inputs(tokens, 'cuda', torch.bfloat16)
        assert_close(grads_of(compiled, inputs), grads_of(bidirectional_gla, inputs), 1e-3)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_cuda_graph() -> None:
    inputs = make_inputs(300, 'cuda', torch.bfloat16)
    do = torch.randn_like(inputs[2])

    def step() -> list[Tensor]:
        out = bidirectional_gla(*inputs)
        return [out, *torch.autograd.grad(out, inputs, do)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


class Mixer(nn.Module):
    """The least module around the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 4 * 32 + 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, *gates = self.project(x)[:, :, None].split([32, 32, 64, 32, 32], -1)
        return bidirectional_gla(q, k, v, *(F.logsigmoid(g) / 16 for g in gates))[:, :, 0]


@pytest.mark.gpu
def test_autocast_checkpointing_and_functional_call() -> None:
    mixer, x = Mixer().cuda(), torch.randn(2, 200, 64, device='cuda')
    grads = []
    with torch.autocast('cuda', torch.bfloat16):
        params = dict(mixer.named_parameters())
        for out in (
            mixer(x),
            checkpoint(mixer, x, use_reentrant=False),
            torch.func.functional_call(mixer, params, (x,)),
        ):
            assert out.dtype == torch.bfloat16
            grads.append(torch.autograd.grad(out.float().square().sum(), mixer.parameters()))
    for other in grads[1:]:
        for x, y in zip(other, grads[0], strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.gpu
def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(40, 'cuda')
    out = bidirectional_gla(*inputs)
    (dq,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='differentiable once'):
        dq.sum().backward()


@pytest.mark.gpu
def test_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigla_trust, 'find_fault', lambda *args: 'it was told to fail')
    bigla_trust._checked.cache_clear()
    bigla_trust._warned.clear()
    inputs = make_inputs(60, 'cuda')
    with pytest.warns(RuntimeWarning, match='it was told to fail') as record:
        eager = grads_of(bidirectional_gla, inputs)
        registered = grads_of(partial(registered_operator, scale=32**-0.5), inputs)
    assert len([w for w in record if 'told to fail' in str(w.message)]) == 1
    bigla_trust._checked.cache_clear()
    bigla_trust._warned.clear()
    # As the operator's fake has it, which compiled graphs rely on.
    assert all(x.is_contiguous() for x in registered)
    expected = grads_of(bigla_chunked.bidirectional_gla, inputs)
    assert_close(eager, expected, 1e-5)
    assert_close(registered, expected, 1e-5)
