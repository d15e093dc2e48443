"""The forward of `bidirectional_gla`: its three forms."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .interpreter import run_interpreted

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton', allow_module_level=True)

from mmvig.kernels import bigla_fwd
from mmvig.kernels.bigla_forms import Forms


@pytest.mark.parametrize('kernels', ['bigla_fwd', 'bigla_fwd_gluon'])
def test_kernels_under_the_interpreter(kernels: str) -> None:
    """Runs `test_*_kernels.py` in a process where Triton is not yet imported."""
    run_interpreted(Path(__file__).with_name(f'test_{kernels}_kernels.py'))


def make_inputs(device: str = 'cpu', tokens: int = 40) -> list[Tensor]:
    """q, k, v and both gates, as the faster forms take them."""
    xs = [torch.randn(1, tokens, 2, d, device=device) for d in (32, 32, 64, 32, 32)]
    xs[3:] = (-0.05 * x.abs() for x in xs[3:])
    return [x.bfloat16() for x in xs]


# From here on: on a GPU.


@pytest.mark.gpu
def test_falls_back_to_the_general_form_with_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs('cuda', 300)
    expected = bigla_fwd.forward(*inputs, 0.2)
    bigla_fwd.FORMS.forget()
    monkeypatch.setattr(Forms, 'find_fault', lambda *args: 'it was told to fail')
    with pytest.warns(RuntimeWarning, match='it was told to fail') as record:
        actual = [bigla_fwd.forward(*inputs, 0.2) for _ in range(2)][0]
    bigla_fwd.FORMS.forget()
    assert len(record) == len(bigla_fwd.FORMS.available(inputs[0].device))
    assert ((actual - expected).float().norm() / expected.float().norm()).item() < 1.5e-2


@pytest.mark.gpu
@pytest.mark.parametrize('scale', [0.0, -0.2, 1e-9, 1e9])
def test_takes_scales_without_a_logarithm(scale: float) -> None:
    inputs = make_inputs('cuda', 100)
    actual = bigla_fwd.forward(*inputs, scale).float()
    expected = scale * bigla_fwd.forward(*inputs, 1.0).float()
    assert ((actual - expected).norm() <= 1.5e-2 * expected.norm()).item()


@pytest.mark.gpu
def test_every_form_is_right_here() -> None:
    forms, device = bigla_fwd.FORMS, torch.device('cuda')
    for form in forms:
        assert not form.available(device) or forms.find_fault(form, device) is None, form.name
