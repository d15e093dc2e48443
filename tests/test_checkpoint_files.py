"""Checkpoint files: every format is read, training checkpoints are, damage is one line."""

import argparse
import importlib
import io
import logging
import os
import pickle
import random
import sys
import warnings
from collections import Counter, defaultdict
from datetime import timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from safetensors.torch import save, save_file

from mmvig.checkpoint import find_state_dict, load_pretrained, read_checkpoint
from tests.models.test_vig import small_vig


class Node(dict):
    """As the nodes of config packages: a dict with more."""


class Level(Enum):
    HIGH = 1


def lr_schedule() -> torch.optim.lr_scheduler.LRScheduler:
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


class Config:
    """As a training script's config object: a class that a reader does not have."""

    def __init__(self) -> None:
        self.lr = 0.1
        self.node = Node(a=Node(b=[1]), array=np.arange(3), scalar=np.float64(1))
        self.nested = [SimpleNamespace(a=1), {2, 3}, Path('a'), torch.float16]
        self.args = argparse.Namespace(output=Path('out'), dtype=np.dtype('f4'), since=timedelta(1))
        self.cfg = ConfigDict(optimizer=dict(type='AdamW'))
        self.act, self.norm = torch.nn.functional.gelu, partial(torch.nn.LayerNorm, eps=1e-6)
        self.logger, self.machine = logging.getLogger('train'), os.uname()
        self.random = [random.Random(0), np.random.RandomState(0), np.random.default_rng(0)]
        self.counts = [Counter('ab'), defaultdict(list), range(3), slice(2), 1j, Level.HIGH]
        self.net, self.schedule = torch.nn.Conv2d(1, 1, 1), lr_schedule()


def training_checkpoint(weights: dict) -> dict:
    """What official training scripts and mmengine's hooks write beside the weights."""
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    return {
        'model': {k: torch.zeros_like(v) for k, v in weights.items()},
        'model_ema': weights,
        'optimizer': optimizer.state_dict(),
        'config': Config(),
        'message_hub': HistoryBuffer([1.0], [1]),
        'epoch': 3,
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: weights,
        lambda weights: {'model': weights},
        lambda weights: {'model': {'a': torch.zeros(1)}, 'model_ema': weights, 'epoch': 3},
        lambda weights: {'model': weights, 'model_ema': None},
        lambda weights: {'state_dict': {f'backbone.{k}': v for k, v in weights.items()}},
        lambda weights: {
            'state_dict': {f'backbone.{k}': v for k, v in weights.items()},
            # mmengine's EMAHook swaps the two when it saves
            'ema_state_dict': {f'module.backbone.{k}': v * 2 for k, v in weights.items()},
        },
        lambda weights: {'model': {f'module.{k}': v for k, v in weights.items()}},
        training_checkpoint,
    ],
    ids=[
        'bare',
        'model',
        'model_ema first',
        'no model_ema',
        'detector',
        'detector with EMA',
        'DistributedDataParallel',
        'training checkpoint',
    ],
)
@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_where_weights_are_found(wrap, new_format: bool, tmp_path: Path) -> None:
    source, target = small_vig(), small_vig()
    file = tmp_path / 'weights.pth'
    torch.save(wrap(source.state_dict()), file, _use_new_zipfile_serialization=new_format)
    load_pretrained(target, str(file))
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.parametrize('found', ['changed', 'missing'])
def test_the_source_code_of_modules_in_old_files_is_none_of_ours(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'net.py').write_text('import torch\nclass Net(torch.nn.Module):\n    size = 1\n')
    content = {'model': {'a': torch.ones(1)}, 'net': importlib.import_module('net').Net()}
    torch.save(content, tmp_path / 'net.pth', _use_new_zipfile_serialization=False)
    (tmp_path / 'net.py').write_text('import torch\nclass Net(torch.nn.Module):\n    size = 22\n')
    module = sys.modules.pop('net')
    if found == 'changed':
        monkeypatch.setitem(sys.modules, 'net', module)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert find_state_dict(read_checkpoint(str(tmp_path / 'net.pth'))) == {'a': torch.ones(1)}


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.bin'])
def test_safetensors(name: str, tmp_path: Path) -> None:
    source, target = small_vig(), small_vig()
    save_file(source.state_dict(), tmp_path / name)
    load_pretrained(target, str(tmp_path / name))
    assert same(source.state_dict(), target.state_dict())


def test_half_precision_weights(tmp_path: Path) -> None:
    source, target = small_vig().bfloat16(), small_vig()
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    load_pretrained(target, str(tmp_path / 'weights.pth'))
    assert same(source.float().state_dict(), target.state_dict())


def whole_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({'model': small_vig().state_dict()}, buffer)
    return buffer.getvalue()


def legacy_file() -> bytes:
    buffer = io.BytesIO()
    torch.save(small_vig().state_dict(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def flipped_bit() -> bytes:
    content = bytearray(whole_file())
    content[len(content) // 2] ^= 1
    return bytes(content)


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    return buffer.getvalue()


def truncated_safetensors() -> bytes:
    return save(small_vig().state_dict())[:-100]


@pytest.mark.filterwarnings('ignore:`torch.jit')
@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (lambda: whole_file()[:5000], 'its end is missing'),
        (lambda: legacy_file()[:5000], 'truncated or damaged'),
        (lambda: legacy_file()[:-100], 'truncated or damaged'),
        (flipped_bit, r'the checksum of its record .*/data/\d+ is wrong'),
        (truncated_safetensors, 'truncated or damaged'),
        (torchscript, 'it is a TorchScript program'),
        (lambda: pickle.dumps([1, 2]), 'truncated or damaged'),
    ],
    ids=[
        'truncated',
        'truncated legacy',
        'truncated tensor',
        'flipped bit',
        'truncated safetensors',
        'TorchScript',
        'bare pickle',
    ],
)
def test_damaged_files(content, reason: str, tmp_path: Path) -> None:
    file = tmp_path / 'weights.pth'
    file.write_bytes(content())
    with pytest.raises(ValueError, match=reason) as error:
        load_pretrained(small_vig(), str(file))
    assert str(error.value).startswith(f'{file} cannot be read as a checkpoint')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('content', 'kind'),
    [
        (b'\xef\xbb\xbf\n<!DOCTYPE html><html>not found</html>', 'an HTML page'),
        (b'<html><title>caf\xe9</title></html>', 'an HTML page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'text'),
        (('x' * 255 + '\u00e9').encode(), 'text'),
        (b'{"error": "Access to this repository is restricted"}', 'text'),
    ],
)
@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors'])
def test_failed_downloads(content: bytes, kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = rf'^{tmp_path / name} is {kind}, not a checkpoint, .*: download it again$'
    with pytest.raises(ValueError, match=message):
        read_checkpoint(str(tmp_path / name))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'no checkpoint at .*none\.pth'):
        load_pretrained(small_vig(), str(tmp_path / 'none.pth'))


def test_no_weights_in_it() -> None:
    with pytest.raises(ValueError, match=r'w\.pth holds no state dict, bare or under .*, but '):
        find_state_dict({'epoch': 3, 'model': {'lr': 1}}, 'w.pth')


def test_an_empty_file_is_called_that(tmp_path: Path) -> None:
    (tmp_path / 'w.pth').touch()
    with pytest.raises(ValueError, match=r'w\.pth is empty, as after a failed download'):
        read_checkpoint(str(tmp_path / 'w.pth'))
