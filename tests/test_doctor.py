"""`python -m mmvig.doctor` runs everywhere; what it hands to other processes can be found there."""

import pickle
import subprocess
import sys

import pytest
import torch

from mmvig.doctor import report


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    command = [sys.executable, '-m', 'mmvig.doctor', '--quick']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert torch.__version__.split('+')[0] in result.stdout
    assert 'nothing to check' in result.stdout


def test_spawned_processes_find_the_check() -> None:
    assert b'mmvig.doctor.report' in pickle.dumps(report.check)


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
