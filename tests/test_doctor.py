"""`python -m mmvig.doctor`: runs everywhere, replaces broken processes alone, tells the verdict."""

import re
import subprocess
import sys
from itertools import product

import pytest
import torch

from mmvig.doctor import bigla, processes, report
from mmvig.doctor.processes import DIED, Processes

CASES = 'tests.doctor_cases'


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    command = [sys.executable, '-m', 'mmvig.doctor', '--quick']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert torch.__version__.split('+')[0] in result.stdout
    assert 'nothing to check' in result.stdout


def test_a_process_that_dies_is_a_finding() -> None:
    with Processes(1) as alone:
        assert list(alone.map([(CASES, 'ends')])) == [DIED]


class Inline:
    """In place of a process: runs in this one, and fails from the first failure of CUDA on."""

    started = 0

    def __init__(self, workers: int, context: object, initializer: object) -> None:
        Inline.started += 1
        self.broken = False

    def submit(self, function, job: processes.Job) -> 'Inline':
        self.value = 'CUDA error: broken before' if self.broken else function(job)
        self.broken = self.broken or 'CUDA' in self.value
        return self

    def result(self) -> processes.Result:
        return self.value

    def shutdown(self, wait: bool = True) -> None:
        pass


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, 'ProcessPoolExecutor', Inline)
    monkeypatch.setattr(Inline, 'started', 0)


def test_only_broken_processes_are_replaced(inline) -> None:
    """What failed in a used process is tried again in a fresh one, and that is not used again."""
    jobs = [(CASES, case) for case in ('fine', 'wrong', 'raises', 'raises', 'fine', 'fine')]
    with Processes(1) as alone:
        results = list(alone.map(jobs))
    error = 'RuntimeError: CUDA error: it was told to fail'
    fine = ([0.5], 0.75)
    assert results == [fine, ([1.0], 0.75), error, error, fine, fine]
    assert Inline.started == 4  # the first, for each failure a fresh one, one more for the rest


def test_whole_report(inline, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(report, 'MODULES', (CASES,))
    assert not report.check_all(quick=True)
    out = capsys.readouterr().out
    assert re.search(r'3 cases, \d+ at a time', out)
    verdicts = re.findall(r'^(fine|wrong|raises) .*(right|WRONG)$', out, re.MULTILINE)
    assert verdicts == [('fine', 'right'), ('wrong', 'WRONG'), ('raises', 'WRONG')]
    assert '2 cases are WRONG' in out


@pytest.mark.parametrize(
    ('result', 'right'),
    [
        (([1e-3, 2e-3], 1e-2), True),
        (([1e-3, 2e-2], 1e-2), False),
        (([1e-3, float('nan')], 1e-2), False),
        ('RuntimeError: no', False),
    ],
)
def test_verdict(result: tuple | str, right: bool, capsys: pytest.CaptureFixture) -> None:
    assert report.report('case', result) is right
    assert ('WRONG' in capsys.readouterr().out) is not right


def test_every_block_size_and_setting_of_bigla_is_checked() -> None:
    pytest.importorskip('triton')
    cases = list(bigla.cases(quick=False))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        own = [c for c in cases if c.dtype == c.gate_dtype == dtype]
        assert {c.key_dim for c in own} == {16, 32, 64, 128}
        assert {c.value_dim for c in own if c.key_dim == 16} == {32, 64, 96, 128}
    for case in (cases[0], cases[1]):
        gates = {gate for _, gate, _ in bigla.settings(case)}
        assert min(gates) < -1 < max(gates)
        for n, _, chunks in bigla.settings(case):
            assert (chunks * bigla.MAX_CHUNK < n) == case.several


def test_every_form_of_biglas_backward_is_checked() -> None:
    pytest.importorskip('triton')
    from mmvig.kernels import bigla_bwd

    forms = [*bigla_bwd.FORMS.available(torch.device('cuda')), bigla.GENERAL]
    several = [c for c in bigla.cases(quick=True) if c.backward]
    assert [(c.backward, c.several) for c in several] == list(product(forms, (True, False)))
    assert all(c.dtype == c.gate_dtype == torch.bfloat16 for c in several)
    assert {(c.key_dim, c.value_dim) for c in several} == {(32, 64)}
    assert len({str(c) for c in several}) == len(several)
    assert all(len(str(c)) < report.NAME_WIDTH for c in bigla.cases(quick=False))
