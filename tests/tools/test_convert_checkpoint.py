"""tools/convert_checkpoint.py: the same weights in safetensors, nothing overwritten."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmvig.checkpoint import load_pretrained
from tests.models.test_vig import small_vig
from tests.test_checkpoint_bombs import Call
from tests.tools.conftest import TOOLS

NAME = 'convert_checkpoint.py'


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs the tool in this process; returns what it printed."""

    def call(*args: str | Path) -> str:
        monkeypatch.syspath_prepend(str(TOOLS))
        monkeypatch.setattr(sys, 'argv', [NAME, *map(str, args)])
        runpy.run_path(str(TOOLS / NAME), run_name='__main__')
        return capsys.readouterr().out

    return call


def write(folder: Path) -> tuple[Path, dict]:
    """A training checkpoint; two tensors share memory, one is not contiguous."""
    weights = small_vig().state_dict()
    weights['head.weight'] = torch.randn(32, 4).t()
    weights['head.bias'] = weights['head.weight'][:, 0]
    content = {'model': {}, 'model_ema': {f'module.{k}': v for k, v in weights.items()}}
    torch.save(content, folder / 'in.pth')
    return folder / 'in.pth', weights


def test_weights_stay_as_they_are(convert: Callable, tmp_path: Path) -> None:
    source, weights = write(tmp_path)
    out = convert(source, tmp_path / 'out.safetensors')
    assert f'{len(weights)} tensors of ViG of 32 dims and 3 blocks, SHA-256' in out
    with safe_open(tmp_path / 'out.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'network': 'ViG of 32 dims and 3 blocks'}
        assert set(file.keys()) == set(weights)
        assert all(torch.equal(file.get_tensor(k), v) for k, v in weights.items())
    assert not list(tmp_path.glob('*.partial'))
    load_pretrained(small_vig(), str(tmp_path / 'out.safetensors'))


def test_own_prefix(convert: Callable, tmp_path: Path) -> None:
    weights = {f'encoder.{k}': v for k, v in small_vig().state_dict().items()}
    torch.save(weights | {'neck.weight': torch.zeros(1)}, tmp_path / 'whole.pth')
    convert(tmp_path / 'whole.pth', tmp_path / 'out.safetensors', '--prefix', 'encoder.')
    load_pretrained(small_vig(), str(tmp_path / 'out.safetensors'))


def test_a_file_that_would_run_code_is_refused(fail: Callable, tmp_path: Path) -> None:
    source, weights = write(tmp_path)
    torch.save({'model': weights, 'config': [Call(os.mkdir, str(tmp_path / 'crater'))]}, source)
    line = fail(NAME, source, tmp_path / 'out.safetensors')
    assert 'in.pth names posix.mkdir' in line and 'nothing in it was executed' in line
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']


def test_what_is_refused(fail: Callable, tmp_path: Path) -> None:
    source, _ = write(tmp_path)
    target = tmp_path / 'out.safetensors'
    assert 'out.pth must end with .safetensors' in fail(NAME, source, tmp_path / 'out.pth')
    assert 'is no folder' in fail(NAME, source, tmp_path / 'none' / 'out.safetensors')
    source.write_bytes(source.read_bytes()[:5000])
    assert 'in.pth cannot be read as a checkpoint' in fail(NAME, source, target)
    assert not target.exists()
    target.touch()
    assert 'out.safetensors exists' in fail(NAME, source, target)
