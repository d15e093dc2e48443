"""Reads checkpoint files, executing nothing that they hold, and finds the weights in them."""

import codecs
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.fileio import get_local_path
from mmengine.logging import MMLogger
from safetensors.torch import load_file
from torch import Tensor

from mmvig.checkpoint import inert
from mmvig.checkpoint.fitting import first
from mmvig.checkpoint.inert import Refusal

# where a training checkpoint keeps its weights, the best first
STATE_DICT_KEYS = ('model_ema', 'state_dict_ema', 'model', 'state_dict')
# prefixes that wrappers add: DistributedDataParallel, detectors and segmentors
WRAPPER_PREFIXES = ('module.', 'backbone.')
ARCHIVE_START = b'PK\x03\x04'
PICKLE_START = b'\x80'
TEXT_START = 256  # bytes that tell text
TORCHSCRIPT_RECORD = 'constants.pkl'


def read_checkpoint(filename: str) -> Mapping:
    """Reads a checkpoint (`torch.save`, new or old format, or safetensors) from a path or URL.

    Nothing that the file holds is imported or called; other objects than tensors and plain
    containers come back as `mmvig.checkpoint.inert.Inert`, and the log names them.

    Raises:
        ValueError: If the file is truncated, damaged, or no checkpoint, or names what is known to
            run code (`mmvig.checkpoint.harmful`), with weights beside it or without.
        FileNotFoundError: If there is no such file.
    """
    foreign = set()
    try:
        with get_local_path(filename) as path:
            content = _read(Path(path), foreign)
    except FileNotFoundError:
        raise FileNotFoundError(f'no checkpoint at {filename}') from None
    except Refusal as refusal:
        raise ValueError(f'{filename} {refusal}') from None
    except Exception as error:
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f'{filename} cannot be read as a checkpoint, it may be truncated or damaged: get it '
            f'again, or save its state dict alone ({reason})'
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(f'{filename} holds no dict of weights but an object of another type')
    if foreign:
        MMLogger.get_current_instance().info(
            f'{filename}: not read, and not executed: {first(sorted(foreign))}'
        )
    return content


def find_state_dict(
    checkpoint: Mapping, filename: str = 'checkpoint', prefix: str = ''
) -> dict[str, Tensor]:
    """The state dict of a checkpoint, without the prefixes of wrappers around the backbone.

    Args:
        checkpoint: What the file holds.
        filename: Its name, for the messages.
        prefix: Take the names that start with it alone, without it, as mmengine does; a wrapper's
            is the default.

    Raises:
        ValueError: If it holds none, or no name with that prefix.
    """
    tensors = _tensors(checkpoint.get(weights_key(checkpoint), checkpoint))
    if not tensors:
        raise ValueError(
            f'{filename} holds no state dict, bare or under {STATE_DICT_KEYS}, but '
            f'{first(list(map(str, checkpoint))) if checkpoint else "nothing"}'
        )
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    names = list(tensors)
    for wrapper in ('', *WRAPPER_PREFIXES):
        tensors = _within(tensors, wrapper) or tensors
        if prefix and (wanted := _within(tensors, prefix)):
            return wanted
    if prefix:
        raise ValueError(f'{filename} holds no names that start with {prefix}: {first(names)}')
    return tensors


def weights_key(checkpoint: Mapping) -> str | None:
    """Key under which a checkpoint keeps its best weights; None where it is a bare state dict."""
    return next((key for key in STATE_DICT_KEYS if _tensors(checkpoint.get(key))), None)


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _tensors(content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def text_kind(path: str | Path) -> str | None:
    """'an HTML page' or 'text' where a file is that, as after a failed download; None elsewhere."""
    with open(path, 'rb') as file:
        start = file.read(TEXT_START).removeprefix(codecs.BOM_UTF8)
    if start.lstrip().lower().startswith((b'<!doctype html', b'<html')):
        return 'an HTML page'
    try:
        text = codecs.getincrementaldecoder('utf-8')().decode(start)
    except UnicodeDecodeError:
        return None
    return 'text' if text and all(c.isprintable() or c.isspace() for c in text) else None


def _read(path: Path, foreign: set[str]) -> object:
    if path.stat().st_size == 0:
        raise Refusal('is empty, as after a failed download or a full disk: fetch it again')
    if kind := text_kind(path):
        raise Refusal(f'is {kind}, not a checkpoint, as after a failed download: download it again')
    with path.open('rb') as file:
        start = file.read(16)
    if zipfile.is_zipfile(path):
        _check_archive(path)
    elif path.suffix == '.safetensors' or start[8:9] == b'{':  # after the length of the header
        return load_file(path)
    elif start.startswith(ARCHIVE_START):
        raise ValueError('its end is missing')
    elif not start.startswith(PICKLE_START) or tarfile.is_tarfile(path):
        raise ValueError(f'neither a file of torch.save nor safetensors: it starts with {start}')
    # a file, as torch would judge a path by its suffix
    with path.open('rb') as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # old files hold modules' source code, ours have none
        return torch.load(
            file, map_location='cpu', weights_only=False, pickle_module=inert, foreign=foreign
        )


def _check_archive(path: Path) -> None:
    """Refuses what torch would hand to its compiler, and records whose bytes have changed."""
    with zipfile.ZipFile(path) as archive:
        if any(Path(name).name == TORCHSCRIPT_RECORD for name in archive.namelist()):
            raise ValueError('it is a TorchScript program')
        # torch is built without this check
        if damaged := archive.testzip():
            raise ValueError(f'the checksum of its record {damaged} is wrong')
