"""The chunked form of bidirectional GLA against the token-by-token definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels import bigla_chunked, reference

SHAPE = dict(batch=2, heads=3, key=8, value=16)


def make_gates(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Log gates of a kind, (B, N, H, K), float64."""
    if kind == 'network':
        return F.logsigmoid(torch.randn(shape, dtype=torch.double)) / 16
    if kind == 'alternating':
        return torch.arange(shape[1]).double().remainder(2).mul(-50)[:, None, None].expand(shape)
    if kind == 'mixed':
        return -(torch.rand(shape, dtype=torch.double) ** 8) * 50
    return torch.full(shape, float(kind), dtype=torch.double)


def make_inputs(tokens: int, kind: str) -> list[Tensor]:
    """q, k, v and both gates, float64 leaves."""
    b, h, k, v = SHAPE.values()
    shape = (b, tokens, h, k)
    q, key = (torch.randn(shape, dtype=torch.double) for _ in range(2))
    value = torch.randn(b, tokens, h, v, dtype=torch.double)
    inputs = [q, key, value, make_gates(kind, shape), make_gates(kind, shape)]
    return [x.clone().requires_grad_() for x in inputs]


def outputs_and_grads(function, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a fixed weighting of it."""
    out = function(*inputs)
    weights = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize('kind', ['network', 'alternating', 'mixed', '0', '-1', '-50', '-1e4'])
@pytest.mark.parametrize('tokens', [1, 2, 63, 64, 65, 196])
def test_matches_the_definition(tokens: int, kind: str) -> None:
    inputs = make_inputs(tokens, kind)
    expected = outputs_and_grads(reference.bidirectional_gla, inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    actual = outputs_and_grads(bigla_chunked.bidirectional_gla, single)
    for name, a, b in zip(('out', 'dq', 'dk', 'dv', 'dgf', 'dgb'), actual, expected, strict=True):
        assert relative_error(a, b) < 1e-5, name


def test_infinite_gates_separate_the_tokens() -> None:
    q, k, v, *_ = make_inputs(130, '0')
    gates = torch.full_like(k, -float('inf'))
    out = bigla_chunked.bidirectional_gla(q, k, v, gates, gates, scale=1.0)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v)


def test_reversed_sequence_with_swapped_gates_gives_the_reversed_output() -> None:
    inputs = make_inputs(150, 'network')
    q, k, v, fwd, bwd = (x.flip(1) for x in inputs)
    out = bigla_chunked.bidirectional_gla(q, k, v, bwd, fwd)
    torch.testing.assert_close(out.flip(1), bigla_chunked.bidirectional_gla(*inputs))


def test_non_contiguous_inputs() -> None:
    inputs = make_inputs(70, 'network')
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    torch.testing.assert_close(
        bigla_chunked.bidirectional_gla(*strided), bigla_chunked.bidirectional_gla(*inputs)
    )


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = [x.detach().float() for x in make_inputs(100, 'network')]
    with torch.autocast('cpu', torch.bfloat16):
        out = bigla_chunked.bidirectional_gla(*inputs)
    torch.testing.assert_close(out, bigla_chunked.bidirectional_gla(*inputs), rtol=0, atol=0)


def test_half_precision_in_half_precision_out() -> None:
    inputs = make_inputs(100, 'network')
    out = bigla_chunked.bidirectional_gla(*(x.detach().bfloat16() for x in inputs))
    assert out.dtype == torch.bfloat16
    assert relative_error(out, reference.bidirectional_gla(*inputs)) < 2e-2


def test_no_tokens() -> None:
    q, k, fwd, bwd = (torch.zeros(2, 0, 3, 8, requires_grad=True) for _ in range(4))
    v = torch.zeros(2, 0, 3, 16, requires_grad=True)
    out = bigla_chunked.bidirectional_gla(q, k, v, fwd, bwd)
    assert out.shape == v.shape
    grads = torch.autograd.grad(out.sum(), (q, k, v, fwd, bwd))
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v, fwd, bwd)]
