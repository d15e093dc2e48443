"""Reads the checkpoints that mmengine writes, and tells whether one fits a model."""

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmvig.checkpoint import text_kind


def allow_mmengine_checkpoints() -> None:
    """Lets `torch.load(weights_only=True)` read the logs that mmengine stores with the weights.

    That is the default from torch 2.6 on, and mmengine 0.10.7 cannot read its own checkpoints with
    it. Earlier versions of torch default to False and need nothing.
    """
    if torch.__version__ < (2, 6):
        return
    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray
    codes = np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_buffer_method, 'builtins.getattr'),
            np.ndarray,
            np.dtype,
            *{type(np.dtype(code)) for code in codes},
            # numpy 1 and 2 store different names, and each reads both.
            *(
                (getattr(multiarray, name), f'numpy.{core}.multiarray.{name}')
                for name in ('_reconstruct', 'scalar')
                for core in ('core', '_core')
            ),
        ]
    )


def _history_buffer_method(owner: type, name: str) -> Any:
    """Stands for `getattr` in a checkpoint, where it names a buffer's statistics alone."""
    if owner is not HistoryBuffer:
        raise UnpicklingError(f'getattr({owner!r}, {name!r}) in a checkpoint')
    return getattr(owner, name)


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint file, mapped from the disk where the format allows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read as a checkpoint, or stores other objects than
            tensors, numbers and mmengine's logs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'checkpoint {path} is not a file')
    allow_mmengine_checkpoints()
    try:
        checkpoint = torch.load(
            path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except UnpicklingError as error:
        if 'Unsupported global' in str(error):
            blocked = str(error).partition('Unsupported global: ')[2].partition(' was ')[0]
            raise ValueError(
                f'checkpoint {path} stores {blocked}, which may run code when it is loaded; '
                'save its state dict alone'
            ) from error
        raise ValueError(_unreadable(path)) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(_unreadable(path)) from error
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else {}
    if not state_dict or not all(torch.is_tensor(value) for value in state_dict.values()):
        raise ValueError(f'checkpoint {path} holds no state dict, which mmengine stores and reads')
    return state_dict


def _unreadable(path: str | Path) -> str:
    if kind := text_kind(path):
        return f'checkpoint {path} is {kind}, as after a failed download; fetch it again'
    size = Path(path).stat().st_size
    return f'checkpoint {path} ({size} bytes) is truncated or no checkpoint; fetch it again'


def check_fits(model: nn.Module, state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raises where mmengine would load a part of the weights and go on with the rest untrained.

    Args:
        model: What the weights are for.
        state_dict: The weights.
        path: Where they come from, for the message.

    Raises:
        ValueError: If keys or shapes differ.
    """
    loaded = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    expected = {key.removeprefix('module.'): value for key, value in model.state_dict().items()}
    common = expected.keys() & loaded.keys()
    differences = {
        'missing': expected.keys() - loaded.keys(),
        'unexpected': loaded.keys() - expected.keys(),
        'of another shape': {key for key in common if expected[key].shape != loaded[key].shape},
    }
    found = [f'{len(keys)} {kind} ({min(keys)} ...)' for kind, keys in differences.items() if keys]
    if found:
        raise ValueError(
            f'checkpoint {path} does not fit the config, weights {", ".join(found)}; '
            'use the config that it was trained with'
        )
