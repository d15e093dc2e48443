"""tools/verify_checkpoint.py: networks, coverage, checksums, classes, and one-line refusals."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image

from mmvig.checkpoint import guess_arch, load_weights
from tests import parity
from tests.test_checkpoint_bombs import Call
from tests.tools.conftest import TOOLS

NAME = 'verify_checkpoint.py'


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs the tool in this process; returns what it printed."""

    def call(*args: str | Path) -> str:
        monkeypatch.syspath_prepend(str(TOOLS))
        monkeypatch.setattr(sys, 'argv', [NAME, *map(str, args)])
        runpy.run_path(str(TOOLS / NAME), run_name='__main__')
        return capsys.readouterr().out

    return call


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The tool's own functions."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return runpy.run_path(str(TOOLS / NAME))


def write_vig(folder: Path, **more: torch.Tensor) -> Path:
    """A training checkpoint of ViG-T with a head."""
    torch.manual_seed(0)
    weights = MODELS.build(dict(type='ViG', arch='tiny')).state_dict()
    head = {'head.weight': torch.randn(1000, 192), 'head.bias': torch.zeros(1000)}
    torch.save({'model_ema': weights | head | more, 'epoch': 1}, folder / 'vig_t.pth')
    return folder / 'vig_t.pth'


def test_report_and_classes(verify: Callable, tmp_path: Path) -> None:
    file = write_vig(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    *report, first, second, third, fourth, fifth = verify(file, tmp_path / 'image.png').splitlines()
    found = {line[:12].strip(): line[12:] for line in report}
    assert list(found) == ['file', 'weights', 'network', 'coverage', 'parameters']
    assert found['weights'].startswith("under 'model_ema', 180 tensors, SHA-256 ")
    assert found['network'] == 'ViG tiny'
    assert found['coverage'].startswith('178 of the 178 tensors of the backbone, 0 of them resized')
    assert found['coverage'].endswith('not used: head.weight, head.bias')
    assert found['parameters'].startswith('5,834,536 values in the file; 5,641,536 parameters')
    shares = [float(line.split('%')[0]) for line in (first, second, third, fourth, fifth)]
    assert shares == sorted(shares, reverse=True)
    assert all(line.partition('%  ')[2] for line in (first, second, third, fourth, fifth))


@parity.needs_parity
@pytest.mark.parametrize('network', ['vig_tiny', 'vig_h_tiny'])
def test_official_weights_give_the_official_probabilities(functions: dict, network: str) -> None:
    seeded = parity.seeded()
    weights = {k: v.float() for k, v in seeded.fill(parity.keys(network)).items()}
    arch = guess_arch({k: tuple(v.shape) for k, v in weights.items()})
    backbone = functions['build_backbone'](arch, weights)
    load_weights(backbone, weights)
    image = seeded.image(2, 64, 96).float()[1]
    layers = functions['check_head'](arch, weights, 'official.pth')
    found = functions['classify'](backbone, weights, *layers, image)
    logits = np.load(parity.FOLDER / f'{network}_64x96.npz')['logits'][1]
    torch.testing.assert_close(found, torch.from_numpy(logits).softmax(-1), rtol=1e-3, atol=1e-6)


@parity.needs_parity
@pytest.mark.parametrize('network', ['vig_tiny_adapter', 'vig_base_adapter'])
def test_adapters_are_known_with_their_settings(functions: dict, network: str) -> None:
    with torch.device('meta'):
        weights = {k: torch.empty(s) for k, s in parity.keys(network).items()}
        arch = guess_arch({k: tuple(v.shape) for k, v in weights.items()})
        backbone = functions['build_backbone'](arch, weights)
    own = {k.removeprefix('trunk.'): v.shape for k, v in backbone.state_dict().items()}
    assert own == {k: v.shape for k, v in weights.items()}


def test_own_prefix(verify: Callable, tmp_path: Path) -> None:
    weights = MODELS.build(dict(type='ViG', arch='tiny')).state_dict()
    content = {f'encoder.{k}': v for k, v in weights.items()} | {'neck.weight': torch.zeros(1)}
    torch.save(content, tmp_path / 'whole.pth')
    assert 'network     ViG tiny\n' in verify(tmp_path / 'whole.pth', '--prefix', 'encoder')


def test_files_that_are_refused(fail: Callable, tmp_path: Path) -> None:
    file = write_vig(tmp_path)
    (tmp_path / 'cut.pth').write_bytes(file.read_bytes()[:5000])
    assert 'cut.pth cannot be read as a checkpoint' in fail(NAME, tmp_path / 'cut.pth')
    assert 'none.pth does not exist' in fail(NAME, tmp_path / 'none.pth')
    assert f'{tmp_path} is a folder, not a file' in fail(NAME, tmp_path)
    torch.save(torch.zeros(1), tmp_path / 'tensor.pth')
    assert 'tensor.pth holds no dict of weights' in fail(NAME, tmp_path / 'tensor.pth')
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'linear.pth')
    assert 'linear.pth is of none of the networks here' in fail(NAME, tmp_path / 'linear.pth')
    assert 'no names that start with neck.:' in fail(NAME, file, '--prefix', 'neck')
    other = write_vig(tmp_path, extra=torch.zeros(1))
    assert 'does not fit ViG tiny: unexpected: extra; all else fits' in fail(NAME, other)


def test_a_file_that_would_run_code_is_refused(fail: Callable, tmp_path: Path) -> None:
    content = torch.load(write_vig(tmp_path)) | {'config': [Call(os.mkdir, str(tmp_path / 'out'))]}
    torch.save(content, tmp_path / 'bomb.pth')
    line = fail(NAME, tmp_path / 'bomb.pth')
    assert 'bomb.pth names posix.mkdir' in line and 'nothing in it was executed' in line
    assert not (tmp_path / 'out').exists()


def test_images_that_are_refused(fail: Callable, tmp_path: Path) -> None:
    file = write_vig(tmp_path)
    (tmp_path / 'image.png').write_bytes(b'no image')
    assert f'cannot read image {tmp_path / "image.png"}' in fail(NAME, file, tmp_path / 'image.png')
    Image.new('RGB', (32, 32)).save(tmp_path / 'image.png')
    weights = MODELS.build(dict(type='ViG', arch='tiny', final_norm=False)).state_dict()
    torch.save(weights, tmp_path / 'trunk.pth')
    line = fail(NAME, tmp_path / 'trunk.pth', tmp_path / 'image.png')
    assert 'trunk.pth holds no classifier (head or classifier.head), only the backbone' in line
