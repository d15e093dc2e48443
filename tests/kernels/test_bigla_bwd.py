"""The backward of `bidirectional_gla`: its three forms."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .interpreter import run_interpreted

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton', allow_module_level=True)

from mmvig.kernels import bigla_bwd, bigla_chunked
from mmvig.kernels.bigla_forms import Forms


@pytest.mark.parametrize('kernels', ['bigla_bwd', 'bigla_bwd_gluon'])
def test_kernels_under_the_interpreter(kernels: str) -> None:
    """Runs `test_*_kernels.py` in a process where Triton is not yet imported."""
    run_interpreted(Path(__file__).with_name(f'test_{kernels}_kernels.py'))


def make_inputs(device: str = 'cpu', tokens: int = 40) -> list[Tensor]:
    """q, k, v, both gates and the output's gradient, as the form by chunks takes them."""
    xs = [torch.randn(1, tokens, 2, d, device=device) for d in (32, 32, 64, 32, 32, 64)]
    xs[3:5] = (-0.05 * x.abs() for x in xs[3:5])
    return [x.bfloat16() for x in xs]


@pytest.fixture
def checked_anew() -> Iterator[None]:
    """Forms that a test chose, or had fail, are forgotten after it."""
    yield
    bigla_bwd.FORMS.forget()


# From here on: on a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize('tokens', [1, 200, 1500])
def test_every_form_is_right_and_gives_the_same_bits_twice(tokens: int, checked_anew: None) -> None:
    inputs = make_inputs('cuda', tokens)
    device = inputs[0].device
    *args, do = (x.cpu().double() for x in inputs)
    args = [x.requires_grad_() for x in args]
    expected = torch.autograd.grad(bigla_chunked.bidirectional_gla(*args), args, do)
    for name in (*bigla_bwd.FORMS.available(device), None):
        bigla_bwd.FORMS.take(name, device)
        found, again = (bigla_bwd.backward(*inputs, 32**-0.5) for _ in range(2))
        for x, y, z in zip(found, again, expected, strict=True):
            assert torch.equal(x, y), name
            floor = 0.25 * z.numel() ** 0.5
            error = ((x.cpu().double() - z).norm() / z.norm().clamp_min(floor)).item()
            assert error < 1.5e-2, f'{name}: {error:.2e}'


@pytest.mark.gpu
def test_falls_back_to_the_slowest_form_with_a_warning_each(
    checked_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs('cuda', 300)
    expected = bigla_bwd.backward(*inputs, 0.2)
    bigla_bwd.FORMS.forget()
    monkeypatch.setattr(Forms, 'find_fault', lambda *args: 'it was told to fail')
    with pytest.warns(RuntimeWarning, match='it was told to fail') as record:
        actual = [bigla_bwd.backward(*inputs, 0.2) for _ in range(2)][0]
    assert len(record) == len(bigla_bwd.FORMS.available(inputs[0].device))
    for x, y in zip(actual, expected, strict=True):
        assert ((x - y).float().norm() / y.float().norm()).item() < 1.5e-2
