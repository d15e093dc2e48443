"""The backward of `bidirectional_gla`: which of its forms a call takes, and the kernels."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .interpreter import run_interpreted

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton', allow_module_level=True)

from mmvig.kernels import bigla_bwd, bigla_chunked
from mmvig.kernels.bigla_bwd import Form

CUDA = torch.device('cuda', 0)  # of the fakes, which are not launched


@pytest.mark.parametrize('kernels', ['bigla_bwd', 'bigla_bwd_gluon'])
def test_kernels_under_the_interpreter(kernels: str) -> None:
    """Runs `test_*_kernels.py` in a process where Triton is not yet imported."""
    run_interpreted(Path(__file__).with_name(f'test_{kernels}_kernels.py'))


def test_gluon_is_not_imported_with_the_kernels() -> None:
    code = (
        'import sys, mmvig.kernels.bigla_bwd\n'
        "print(any(name.startswith('mmvig.kernels.bigla_bwd_gluon') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'


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


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forms that are not available, wrong, right and right, none checked; the checks that ran."""
    names = []

    def find_fault(form: Form, device: torch.device) -> str | None:
        names.append(form.name)
        return 'it was told to fail' if form.name == 'wrong' else None

    forms = tuple(
        Form(name, lambda device, name=name: name != 'missing', lambda *args, chunks: ())
        for name in ('missing', 'wrong', 'right', 'slower')
    )
    monkeypatch.setattr(bigla_bwd, 'FORMS', forms)
    monkeypatch.setattr(bigla_bwd, '_right', {})
    monkeypatch.setattr(bigla_bwd, 'find_fault', find_fault)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    return names


def taken() -> str | None:
    """The name of the form that a call would take; None is the one by segments."""
    form = bigla_bwd._fastest(CUDA)
    return form.name if form else None


def test_takes_the_fastest_form_that_is_right(checked: list[str]) -> None:
    with pytest.warns(RuntimeWarning, match='backward wrong is wrong .*told to fail') as record:
        assert [taken() for _ in range(3)] == ['right'] * 3
    assert len(record) == 1  # and none of what is missing
    assert checked == ['wrong', 'right']


def test_a_captured_graph_takes_what_was_checked_before(
    checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert taken() is None
    bigla_bwd._right['slower', CUDA] = True
    assert taken() == 'slower'
    assert not checked
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    with pytest.warns(RuntimeWarning):
        assert taken() == 'right'


@pytest.mark.parametrize('name', ['wrong', 'slower', bigla_bwd.SEGMENTS])
def test_takes_the_form_that_it_is_told_to(name: str, checked: list[str]) -> None:
    assert bigla_bwd.available_forms(CUDA) == ['wrong', 'right', 'slower', bigla_bwd.SEGMENTS]
    bigla_bwd.take_form(name, CUDA)
    assert taken() == (None if name == bigla_bwd.SEGMENTS else name)
    assert not checked


@pytest.mark.parametrize(
    ('capability', 'version', 'has'),
    [
        ((9, 0), '3.6.0', True),
        ((9, 0), '3.3.1', False),
        ((9, 0), '3.8.0', False),
        ((8, 0), '3.6.0', False),
        ((10, 0), '3.6.0', False),
    ],
)
def test_gluon_is_for_hopper_and_one_version(
    capability: tuple[int, int], version: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(bigla_bwd.triton, '__version__', version)
    monkeypatch.setattr(bigla_bwd, '_gluon_launcher', lambda: print)
    assert bigla_bwd._has_gluon(CUDA) is has
    monkeypatch.setattr(bigla_bwd, '_gluon_launcher', lambda: None)
    assert not bigla_bwd._has_gluon(CUDA)


def test_a_triton_without_gluon_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('bigla_bwd_gluon', 'bigla_bwd_gluon_states'):
        monkeypatch.delitem(sys.modules, f'mmvig.kernels.{name}', raising=False)
    monkeypatch.setitem(sys.modules, 'triton.experimental', None)
    assert bigla_bwd._gluon_launcher.__wrapped__() is None


# From here on: on a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize('tokens', [1, 200, 1500])
def test_every_form_is_right_and_gives_the_same_bits_twice(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigla_bwd, '_right', {})
    inputs = make_inputs('cuda', tokens)
    *args, do = (x.cpu().double() for x in inputs)
    args = [x.requires_grad_() for x in args]
    expected = torch.autograd.grad(bigla_chunked.bidirectional_gla(*args), args, do)
    for name in bigla_bwd.available_forms(inputs[0].device):
        bigla_bwd.take_form(name, inputs[0].device)
        found, again = (bigla_bwd.backward(*inputs, 32**-0.5) for _ in range(2))
        for x, y, z in zip(found, again, expected, strict=True):
            assert torch.equal(x, y), name
            floor = 0.25 * z.numel() ** 0.5
            error = ((x.cpu().double() - z).norm() / z.norm().clamp_min(floor)).item()
            assert error < 1.5e-2, f'{name}: {error:.2e}'


@pytest.mark.gpu
def test_falls_back_to_the_slowest_form_with_a_warning_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs('cuda', 300)
    expected = bigla_bwd.backward(*inputs, 0.2)
    monkeypatch.setattr(bigla_bwd, '_right', {})
    monkeypatch.setattr(bigla_bwd, 'find_fault', lambda form, device: 'it was told to fail')
    with pytest.warns(RuntimeWarning, match='it was told to fail') as record:
        actual = [bigla_bwd.backward(*inputs, 0.2) for _ in range(2)][0]
    assert len(record) == len(bigla_bwd.available_forms(inputs[0].device)) - 1
    for x, y in zip(actual, expected, strict=True):
        assert ((x - y).float().norm() / y.float().norm()).item() < 1.5e-2
