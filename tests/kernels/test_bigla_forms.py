"""Which form of a pass of `bidirectional_gla` a call takes."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton', allow_module_level=True)

from mmvig.kernels import bigla_forms
from mmvig.kernels.bigla_forms import Form, Forms, fits, in_gluon

CUDA = torch.device('cuda', 0)  # of the fakes, which are not launched


def make_inputs() -> list[Tensor]:
    """q, v, k, both gates and the output's gradient, as the faster forms take them."""
    return [torch.randn(1, 40, 2, d).bfloat16() for d in (32, 64, 32, 32, 32, 64)]


def test_takes_what_was_compared() -> None:
    assert fits(*make_inputs())


@pytest.mark.parametrize('i', range(6))
def test_leaves_other_dtypes_and_strides(i: int) -> None:
    inputs = make_inputs()
    shifted = torch.cat([inputs[i].flatten()[:1], inputs[i].flatten()])[1:].view_as(inputs[i])
    longer = torch.cat([inputs[i], inputs[i][..., :8]], -1)[..., :-8]
    for x in (inputs[i].float(), longer, shifted):
        assert not fits(*inputs[:i], x, *inputs[i + 1 :])


def test_leaves_other_dims() -> None:
    q, v, *others = make_inputs()
    assert not fits(q, v[..., :32].contiguous(), *others)
    assert not fits(q[..., :16].contiguous(), v, *others)


class FakeForms(Forms):
    """One that is not available, then wrong, right and right ones; notes the checks that run."""

    def __init__(self) -> None:
        forms = [
            Form(name, lambda device, name=name: name != 'missing', lambda *args, chunks: ())
            for name in ('missing', 'wrong', 'right', 'slower')
        ]
        super().__init__('backward', forms, lambda *args: {})
        self.checked: list[str] = []

    def find_fault(self, form: Form, device: torch.device) -> str | None:
        self.checked.append(form.name)
        return 'it was told to fail' if form.name == 'wrong' else None

    def taken(self) -> str | None:
        """The name of the form that a call would take; None is the general one."""
        form = self.fastest(CUDA)
        return form.name if form else None


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> FakeForms:
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    return FakeForms()


def test_takes_the_fastest_form_that_is_right(forms: FakeForms) -> None:
    with pytest.warns(RuntimeWarning, match='backward wrong is wrong .*told to fail') as record:
        assert [forms.taken() for _ in range(3)] == ['right'] * 3
    assert len(record) == 1  # and none of what is missing
    assert forms.checked == ['wrong', 'right']
    forms.forget()
    with pytest.warns(RuntimeWarning):
        assert forms.taken() == 'right'


def test_a_captured_graph_takes_what_was_checked_before(
    forms: FakeForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert forms.taken() is None
    forms._right['slower', CUDA] = True
    assert forms.taken() == 'slower'
    assert not forms.checked
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    with pytest.warns(RuntimeWarning):
        assert forms.taken() == 'right'


@pytest.mark.parametrize('name', ['wrong', 'slower', None])
def test_takes_the_form_that_it_is_told_to(name: str | None, forms: FakeForms) -> None:
    assert forms.available(CUDA) == ['wrong', 'right', 'slower']
    forms.take(name, CUDA)
    assert forms.taken() == name
    assert not forms.checked


def test_the_error_of_a_form_is_a_fault() -> None:
    def measure(form: Form, args: list[Tensor], chunks: int) -> dict[str, float]:
        return {'o': 1.0 if form.name == 'wrong' else 0.0}

    forms = Forms('forward', (), measure)
    wrong, right = (Form(name, lambda device: True, lambda: ()) for name in ('wrong', 'right'))
    assert 'error 1.0e+00 of o' in forms.find_fault(wrong, torch.device('cpu'))
    assert forms.find_fault(right, torch.device('cpu')) is None


def test_gluon_is_not_imported_with_the_kernels() -> None:
    code = (
        'import sys, mmvig.kernels.bigla_bwd, mmvig.kernels.bigla_fwd\n'
        "print(any('gluon' in name for name in sys.modules if name.startswith('mmvig')))"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'


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
    monkeypatch.setattr(bigla_forms.triton, '__version__', version)
    assert in_gluon('bigla_forms', 'fits').available(CUDA) is has
    assert not in_gluon('bigla_forms', 'missing').available(CUDA)


@pytest.mark.parametrize('name', ['forward', 'backward'])
def test_a_triton_without_gluon_is_no_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if 'gluon' in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'triton.experimental', None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(bigla_forms.triton, '__version__', '3.6.0')
    module = f'bigla_{name[0]}wd_gluon'
    assert not in_gluon(module, f'{name}_in_gluon').available(CUDA)
