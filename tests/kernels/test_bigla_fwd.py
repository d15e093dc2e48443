"""The forward of `bidirectional_gla`: which of its two forms a call takes, and the faster one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .interpreter import run_interpreted

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton', allow_module_level=True)

from mmvig.kernels import bigla_fwd


def test_kernels_under_the_interpreter() -> None:
    """Runs `test_bigla_fwd_kernels.py` in a process where Triton is not yet imported."""
    run_interpreted(Path(__file__).with_name('test_bigla_fwd_kernels.py'))


def make_inputs(device: str = 'cpu', tokens: int = 40) -> list[Tensor]:
    """q, k, v and both gates, as the faster form takes them."""
    xs = [torch.randn(1, tokens, 2, d, device=device) for d in (32, 32, 64, 32, 32)]
    xs[3:] = (-0.05 * x.abs() for x in xs[3:])
    return [x.bfloat16() for x in xs]


def test_takes_what_was_compared() -> None:
    assert bigla_fwd._fits(*make_inputs(), 0.2)


@pytest.mark.parametrize('i', range(5))
def test_leaves_other_dtypes_and_strides(i: int) -> None:
    inputs = make_inputs()
    changed = inputs[i].float(), torch.cat([inputs[i], inputs[i][..., :8]], -1)[..., :-8]
    for x in changed:
        assert not bigla_fwd._fits(*inputs[:i], x, *inputs[i + 1 :], 0.2)


def test_leaves_other_dims() -> None:
    q, k, v, gf, gb = make_inputs()
    assert not bigla_fwd._fits(q, k, v[..., :32].contiguous(), gf, gb, 0.2)
    assert not bigla_fwd._fits(*(x[..., :16].contiguous() for x in (q, k)), v, gf, gb, 0.2)


@pytest.mark.parametrize('scale', [0.0, -0.2, 1e-9, 1e9, float('nan')])
def test_leaves_scales_without_a_logarithm(scale: float) -> None:
    assert not bigla_fwd._fits(*make_inputs(), scale)


@pytest.mark.gpu
def test_falls_back_to_the_other_form_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs('cuda', 300)
    expected = bigla_fwd.forward(*inputs, 0.2)
    monkeypatch.setattr(bigla_fwd, '_right', {})
    monkeypatch.setattr(bigla_fwd, 'find_fault', lambda device: 'it was told to fail')
    with pytest.warns(RuntimeWarning, match='it was told to fail') as record:
        actual = [bigla_fwd.forward(*inputs, 0.2) for _ in range(2)][0]
    assert len(record) == 1
    assert ((actual - expected).float().norm() / expected.float().norm()).item() < 1.5e-2


@pytest.mark.gpu
def test_the_faster_form_is_right_here() -> None:
    assert bigla_fwd.find_fault(torch.device('cuda')) is None
