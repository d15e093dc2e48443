"""The public `ms_deform_attn`: arguments, dispatch, and life among PyTorch's features."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mmvig.doctor.ms_deform_attn import (
    KINDS,
    LEVELS,
    TOLERANCE,
    draw,
    error,
    expect,
    with_gradients,
)
from mmvig.kernels import ms_deform_attn, ms_deform_attn_plain

from .interpreter import run_interpreted

NAMES = ('output', 'gradient to value', 'gradient to locations', 'gradient to weights')
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
FP32, BF16 = torch.float32, torch.bfloat16


def check(inputs: list[Tensor], function: Callable[..., Tensor] = ms_deform_attn) -> None:
    """Compares output and gradients with the definition in float64."""
    got, expected = with_gradients(function, inputs), expect(inputs)
    assert [x.dtype for x in got] == [inputs[i].dtype for i in (0, 0, 3, 4)]
    for name, x, y in zip(NAMES, got, expected, strict=True):
        assert error(x, y) <= TOLERANCE[inputs[0].dtype], f'{name}: error {error(x, y):.1e}'


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs Triton')
def test_kernels_under_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name('test_ms_deform_attn_kernels.py'))


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('kind', ['random', 'clustered'])
@pytest.mark.parametrize('d', [32, 64, 160])
@pytest.mark.gpu
def test_many_queries(d: int, kind: str, dtype: torch.dtype) -> None:
    check(draw(kind, 2, 3000, 4, d, 4, [(31, 17), (50, 84)], dtype, FP32, 'cuda'))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('kind', KINDS)
def test_backward_in_plain_pytorch(kind: str, dtype: torch.dtype) -> None:
    """What the operator runs where no kernel applies."""
    inputs = draw(kind, 2, 6, 2, 8, 3, LEVELS, dtype, dtype, 'cpu')
    grads = ms_deform_attn_plain.backward(*inputs)
    for x, y in zip(grads, expect(inputs)[1:], strict=True):
        assert error(x, y) <= (1e-12 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize(('d', 'dtype'), [(264, FP32), (16, torch.float64)])
@pytest.mark.gpu
def test_gpu_without_a_kernel(d: int, dtype: torch.dtype) -> None:
    inputs = draw('random', 2, 9, 2, d, 2, LEVELS, dtype, dtype, 'cuda')
    for x, y in zip(with_gradients(ms_deform_attn, inputs), expect(inputs), strict=True):
        assert error(x, y) <= 3e-6


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('b', 'q', 's'), [(0, 5, 9), (2, 0, 9), (2, 5, 0)])
def test_nothing_to_do(b: int, q: int, s: int, device: str) -> None:
    levels = [(3, 3)] if s else [(0, 0)]
    inputs = draw('random', b, q, 2, 8, 2, levels, FP32, FP32, device)
    out, *grads = with_gradients(ms_deform_attn, inputs)
    assert out.shape == (b, q, 16) and not out.any()
    for grad, x in zip(grads, (inputs[0], *inputs[3:5]), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_gradcheck() -> None:
    value, shapes, starts, locations, weights, _ = draw(
        'random', 2, 4, 2, 8, 2, [(4, 5), (2, 3)], torch.float64, torch.float64, 'cpu'
    )

    def op(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, shapes, starts, locations, weights)

    assert gradcheck(op, [x.requires_grad_() for x in (value, locations, weights)])


@pytest.mark.parametrize('device', DEVICES)
def test_operator_is_registered_in_full(device: str) -> None:
    """PyTorch's own checks of schema, fake tensors, autograd and dynamic shapes."""
    value, shapes, starts, locations, weights, _ = draw(
        'random', 2, 9, 2, 16, 2, [(4, 5), (2, 3)], FP32, FP32, device
    )
    args = [value.requires_grad_(), shapes, starts, locations.requires_grad_(), weights]
    torch.library.opcheck(torch.ops.mmvig.ms_deform_attn.default, args)


@pytest.mark.parametrize('device', DEVICES)
def test_compiled_with_dynamic_shapes(device: str) -> None:
    backend = 'inductor' if device == 'cuda' else 'aot_eager'
    compiled = torch.compile(ms_deform_attn, fullgraph=True, dynamic=True, backend=backend)
    for b, q in ((2, 30), (1, 41)):
        inputs = draw('random', b, q, 2, 16, 2, LEVELS, FP32, FP32, device)
        check(inputs, compiled)


@pytest.mark.gpu
def test_cuda_graph_follows_its_inputs() -> None:
    inputs = draw('random', 2, 50, 2, 32, 4, LEVELS, BF16, FP32, 'cuda')
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        with_gradients(ms_deform_attn, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = with_gradients(ms_deform_attn, inputs)
    for x in (inputs[0], *inputs[3:]):
        x.copy_(x.flip(1).clone())
    graph.replay()
    expected = with_gradients(ms_deform_attn, inputs)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)


@pytest.mark.gpu
def test_deterministic_when_asked() -> None:
    inputs = draw('clustered', 2, 2000, 2, 32, 4, LEVELS, FP32, FP32, 'cuda')
    torch.use_deterministic_algorithms(True)
    try:
        check(inputs)
        first, second = (with_gradients(ms_deform_attn, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('device', DEVICES)
def test_autocast_rounds_value_alone(device: str) -> None:
    value, shapes, starts, locations, weights, grad = draw(
        'random', 1, 30, 2, 16, 2, LEVELS, FP32, FP32, device
    )
    with torch.autocast(device, torch.bfloat16):
        out = ms_deform_attn(value, shapes, starts, locations, weights)
    expected = ms_deform_attn(value.bfloat16(), shapes, starts, locations, weights)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_only_needed_gradients() -> None:
    value, shapes, starts, locations, weights, grad = draw(
        'random', 1, 30, 2, 16, 2, LEVELS, FP32, FP32, 'cuda'
    )
    full = with_gradients(ms_deform_attn, [value, shapes, starts, locations, weights, grad])[1:]
    for i, expected in enumerate(full):
        leaves = [x.detach().clone() for x in (value, locations, weights)]
        leaves[i].requires_grad_()
        out = ms_deform_attn(leaves[0], shapes, starts, *leaves[1:])
        out.backward(grad)
        torch.testing.assert_close(leaves[i].grad, expected)
        assert all(x.grad is None for j, x in enumerate(leaves) if j != i)


@pytest.mark.gpu
def test_second_derivative_is_refused() -> None:
    value, shapes, starts, locations, weights, _ = draw(
        'random', 1, 3, 1, 8, 1, [(2, 2)], FP32, FP32, 'cuda'
    )
    out = ms_deform_attn(value.requires_grad_(), shapes, starts, locations, weights)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiable once'):
        grad.sum().backward()


def _bad(name: str, change: Callable[[Tensor], Tensor], message: str) -> tuple:
    return pytest.param(name, change, message, id=message)


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        _bad('value', lambda x: x[0], r'value must be .* got \(29, 2, 16\)'),
        _bad('value', lambda x: x[:1], r'\(2, 5, 2, 2, 4, 2\) must share .* \(1, 29, 2, 16\)'),
        _bad(
            'value', lambda x: x[:, :, :1], r'\(2, 5, 2, 2, 4, 2\) must share .* \(2, 29, 1, 16\)'
        ),
        _bad('value', lambda x: x.half(), r'float64.*float64.*value \(torch.float16\)'),
        _bad('value', lambda x: x.long(), 'floating dtype, got torch.int64'),
        _bad('locations', lambda x: x[..., 0], r'\(B, Q, H, L, P, 2\), got \(2, 5, 2, 2, 4\)'),
        _bad('locations', lambda x: x.float(), r'\(torch.float32\) and .* \(torch.float64\)'),
        _bad('weights', lambda x: x[:, :4], r'\(2, 4, 2, 2, 4\) must be .* \(2, 5, 2, 2, 4, 2\)'),
        _bad('shapes', lambda x: x[:1], r'\(1, 2\) and .* \(2,\) must be \(2, 2\)'),
        _bad('starts', lambda x: x[:1], r'\(2, 2\) and .* \(1,\) must be \(2, 2\)'),
        _bad('starts', lambda x: x.float(), 'level_start_index .* got torch.float32'),
        _bad('weights', lambda x: x.to('meta'), 'attention_weights is on meta, value on cpu'),
    ],
)
def test_arguments_that_do_not_fit(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    levels = [(4, 5), (3, 3)]
    *inputs, _ = draw('random', 2, 5, 2, 16, 4, levels, torch.float64, torch.float64, 'cpu')
    named = dict(zip(('value', 'shapes', 'starts', 'locations', 'weights'), inputs, strict=True))
    named[name] = change(named[name])
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*named.values())


@pytest.mark.gpu
def test_half_locations_need_half_values() -> None:
    *inputs, _ = draw('random', 1, 5, 1, 8, 2, LEVELS, FP32, BF16, 'cuda')
    with pytest.raises(ValueError, match=r'bfloat16.*must both have the dtype of value'):
        ms_deform_attn(*inputs)
