"""The backward of `bidirectional_gla`: which of its two forms a call takes, and the kernels."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .interpreter import run_interpreted

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton', allow_module_level=True)

from mmvig.kernels import bigla_bwd


def test_kernels_under_the_interpreter() -> None:
    """Runs `test_bigla_bwd_kernels.py` in a process where Triton is not yet imported."""
    run_interpreted(Path(__file__).with_name('test_bigla_bwd_kernels.py'))


def make_inputs(device: str = 'cpu', tokens: int = 40) -> list[Tensor]:
    """q, k, v, both gates and the output's gradient, as the form by chunks takes them."""
    xs = [torch.randn(1, tokens, 2, d, device=device) for d in (32, 32, 64, 32, 32, 64)]
    xs[3:5] = (-0.05 * x.abs() for x in xs[3:5])
    return [x.bfloat16() for x in xs]


def test_takes_what_was_compared() -> None:
    assert bigla_bwd._fits(*make_inputs())


@pytest.mark.parametrize('i', range(6))
def test_leaves_other_dtypes_and_strides(i: int) -> None:
    inputs = make_inputs()
    changed = inputs[i].float(), torch.cat([inputs[i], inputs[i][..., :8]], -1)[..., :-8]
    for x in changed:
        assert not bigla_bwd._fits(*inputs[:i], x, *inputs[i + 1 :])


def test_leaves_other_dims() -> None:
    q, k, v, gf, gb, do = make_inputs()
    assert not bigla_bwd._fits(q, k, v[..., :32].contiguous(), gf, gb, do[..., :32].contiguous())
    assert not bigla_bwd._fits(*(x[..., :16].contiguous() for x in (q, k)), v, gf, gb, do)


@pytest.mark.gpu
def test_falls_back_to_the_other_form_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs('cuda', 300)
    expected = bigla_bwd.backward(*inputs, 0.2)
    monkeypatch.setattr(bigla_bwd, '_right', {})
    monkeypatch.setattr(bigla_bwd, 'find_fault', lambda device: 'it was told to fail')
    with pytest.warns(RuntimeWarning, match='it was told to fail') as record:
        actual = [bigla_bwd.backward(*inputs, 0.2) for _ in range(2)][0]
    assert len(record) == 1
    for x, y in zip(actual, expected, strict=True):
        assert ((x - y).float().norm() / y.float().norm()).item() < 1.5e-2
