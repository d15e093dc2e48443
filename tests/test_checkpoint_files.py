"""Checkpoint files: every format is read, nothing in a file is executed, damage is one line."""

import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save, save_file

from mmvig.checkpoint import find_state_dict, inert, load_pretrained, read_checkpoint
from tests.models.test_vig import small_vig


class Node(dict):
    """As the nodes of config packages: a dict with more."""


class Config:
    """As a training script's config object: a class that a reader does not have."""

    def __init__(self) -> None:
        self.lr = 0.1
        self.node = Node(a=Node(b=[1]), array=np.arange(3), scalar=np.float64(1))
        self.nested = [SimpleNamespace(a=1), {2, 3}, Path('a'), torch.float16]


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


class NestedBomb:
    """Makes `torch.storage._load_from_bytes`, which unpickles anything, unpickle a bomb."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        buffer = io.BytesIO()
        torch.save(Bomb(self.path), buffer)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)


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


@pytest.mark.parametrize('bomb', [Bomb, NestedBomb])
@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_a_bomb_beside_good_weights(bomb: type, new_format: bool, tmp_path: Path) -> None:
    """Is refused, and nothing executed; the file does explode where it is trusted."""
    source, target = small_vig(), small_vig()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    file, crater = tmp_path / 'weights.pth', tmp_path / 'crater'
    config = Node(a=[1, {'deep': bomb(crater)}])
    content = {'model': source.state_dict(), 'config': config}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    named = 'torch.storage._load_from_bytes' if bomb is NestedBomb else f'{os.name}.*mkdir'
    with pytest.raises(ValueError, match=f'is refused: .* a call of {named}') as error:
        load_pretrained(target, str(file))
    assert '\n' not in str(error.value)
    assert not crater.exists()
    assert same(before, target.state_dict())
    torch.load(file, weights_only=False)
    assert crater.exists()


def test_a_file_that_is_a_bomb_only(tmp_path: Path) -> None:
    file = tmp_path / 'weights.pth'
    torch.save(Bomb(tmp_path / 'crater'), file)
    with pytest.raises(ValueError, match='is refused: ') as error:
        read_checkpoint(str(file))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'crater').exists()


@pytest.mark.parametrize(
    'name', ['builtins eval', '__builtin__ exec', 'os system', 'importlib.util find_spec']
)
def test_names_that_are_forbidden(name: str) -> None:
    program = b'c' + '\n'.join(name.split()).encode() + b'\n.'
    with pytest.raises(inert.ForbiddenError, match=name.replace(' ', '.')):
        inert.load(io.BytesIO(program))


@pytest.mark.parametrize('name', ['builtins getattr', 'ossaudiodev open', 'types SimpleNamespace'])
def test_names_that_are_inert(name: str) -> None:
    program = b'c' + '\n'.join(name.split()).encode() + b'\n.'
    assert inert.load(io.BytesIO(program)) is inert.Inert


def test_a_file_changes_no_function() -> None:
    """A pickle may set attributes of whatever it names; ours does not."""
    function = torch._utils._rebuild_tensor_v2
    program = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x07alteredI1\nsb.'
    assert pickle.loads(program) is function
    assert function.__dict__.pop('altered') == 1
    assert inert.load(io.BytesIO(program)) is function
    assert 'altered' not in function.__dict__


@pytest.mark.parametrize('opcode', [b'(S"crater"\nigzip\nopen\n.', b'(cgzip\nopen\nS"crater"\no.'])
def test_old_opcodes_execute_nothing_either(opcode: bytes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(inert.load(io.BytesIO(opcode)), inert.Inert)
    assert not list(tmp_path.iterdir())


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
        (lambda: b'<!DOCTYPE html><html>not found</html>', 'it is a web page'),
        (lambda: b'', 'it starts with'),
        (lambda: pickle.dumps([1, 2]), 'truncated or damaged'),
    ],
    ids=[
        'truncated',
        'truncated legacy',
        'truncated tensor',
        'flipped bit',
        'truncated safetensors',
        'TorchScript',
        'web page',
        'empty',
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


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'no checkpoint at .*none\.pth'):
        load_pretrained(small_vig(), str(tmp_path / 'none.pth'))


def test_no_weights_in_it() -> None:
    with pytest.raises(ValueError, match=r'w\.pth holds no state dict'):
        find_state_dict({'epoch': 3, 'model': {'lr': 1}}, 'w.pth')
