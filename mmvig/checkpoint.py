"""Checkpoints of others, and our own, into our backbones: strictly, or with one clear error.

Our parameter names are the official ones, so most of the work is to say what does not fit.
"""

from collections.abc import Mapping

import torch
from mmengine.fileio import get_local_path
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmvig.models.layers.embed import resize_pos_embed

# where a training checkpoint keeps its weights, the best first
STATE_DICT_KEYS = ('model_ema', 'model', 'state_dict')
# prefixes that wrappers add: DistributedDataParallel, detectors and segmentors
WRAPPER_PREFIXES = ('module.', 'backbone.')
# what a classification network has and a trunk for dense prediction has not
CLASSIFIER_KEYS = ('norm.', 'head.', 'fc_norm.', 'cls_token', 'dist_token', 'head_dist.')
# what only the adapter has, as ViT-Adapter names it
ADAPTER_KEYS = (
    'level_embed',
    'spm.',
    'interactions.',
    'up.',
    'norm1.',
    'norm2.',
    'norm3.',
    'norm4.',
)
TRUNK_PREFIX = 'trunk.'
POS_EMBED = 'pos_embed'


def init_pretrained(backbone: nn.Module) -> bool:
    """Loads the checkpoint that `backbone.init_cfg` names; says whether it names one.

    Raises:
        ValueError: If the file cannot be read or does not fit the backbone.
        FileNotFoundError: If there is no such file.
    """
    cfg = backbone.init_cfg
    if not isinstance(cfg, Mapping) or cfg.get('type') != 'Pretrained':
        return False
    if unknown := set(cfg) - {'type', 'checkpoint', 'prefix', 'map_location'}:
        raise ValueError(f'init_cfg has unknown keys {sorted(unknown)}')
    load_pretrained(backbone, cfg['checkpoint'], prefix=cfg.get('prefix', ''))
    backbone._is_init = True
    return True


def load_pretrained(backbone: nn.Module, filename: str, prefix: str = '') -> None:
    """Loads a checkpoint file into a backbone, strictly.

    Args:
        backbone: `ViG`, `TimmViT`, or `ViTAdapter` around one.
        filename: Path or URL. Bare state dict, or a training checkpoint that holds one.
        prefix: Keep only the keys that start with it, and cut it off.

    Raises:
        ValueError: If the file cannot be read or does not fit; names the first offending keys.
        FileNotFoundError: If there is no such file.
    """
    state_dict = find_state_dict(read_checkpoint(filename), filename)
    if prefix:
        state_dict = {
            k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)
        }
    own = backbone.state_dict()
    try:
        fitted = fit_state_dict(state_dict, {k: tuple(v.shape) for k, v in own.items()})
    except ValueError as error:
        raise ValueError(f'{filename} does not fit {_describe(backbone)}: {error}') from None
    backbone.load_state_dict({**own, **fitted})
    logger = MMLogger.get_current_instance()
    logger.info(
        f'{filename}: loaded {len(fitted)} tensors into {_describe(backbone)}, '
        f'left out {len(state_dict) - len(fitted)}, kept {len(own) - len(fitted)} as initialised'
    )


def read_checkpoint(filename: str) -> Mapping:
    """Reads a checkpoint from a path or URL; executes nothing that the file holds.

    Raises:
        ValueError: If the file is truncated, damaged, or no checkpoint.
        FileNotFoundError: If there is no such file.
    """
    try:
        with get_local_path(filename) as path:
            return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f'no checkpoint at {filename}') from None
    except Exception as error:
        reason = str(error).strip().split('\n')[0][:200]
        raise ValueError(
            f'{filename} cannot be read as a checkpoint; it may be truncated or hold more than '
            f'tensors: get it again, or save its state dict alone ({reason})'
        ) from None


def find_state_dict(checkpoint: Mapping, filename: str = 'checkpoint') -> dict[str, Tensor]:
    """The state dict of a checkpoint, without the prefixes of wrappers around the backbone.

    Raises:
        ValueError: If it holds none.
    """
    state_dict = checkpoint
    for key in STATE_DICT_KEYS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            state_dict = checkpoint[key]
            break
    tensors = isinstance(state_dict, Mapping) and {
        k: v for k, v in state_dict.items() if isinstance(v, Tensor)
    }
    if not tensors:
        raise ValueError(f'{filename} holds no state dict, bare or under {STATE_DICT_KEYS}')
    for prefix in WRAPPER_PREFIXES:
        inner = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        tensors = inner or tensors
    return tensors


def fit_state_dict(
    state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Fits a state dict to a backbone's parameters: a pure function, dict to dict.

    A trunk inside an adapter takes its weights from `trunk.NAME` or, as in ViT-Adapter's flat
    layout, from `NAME`. The position embedding is resized. Left out may only be the final norm and
    the classifier's head; missing may only be the adapter, as a whole.

    Args:
        state_dict: Tensors by name.
        shapes: The backbone's names and shapes.

    Returns:
        The tensors to load, by the backbone's names.

    Raises:
        ValueError: If anything else is missing, unexpected or of another shape.
    """
    fitted, unexpected = {}, []
    for name, tensor in state_dict.items():
        own_name = name if name in shapes else TRUNK_PREFIX + name
        if own_name in shapes:
            fitted[own_name] = _fit_pos_embed(own_name, tensor, shapes[own_name])
        elif not name.startswith(CLASSIFIER_KEYS):
            unexpected.append(name)
    missing = [name for name in shapes if name not in fitted]
    if all(name.startswith(ADAPTER_KEYS) for name in missing) and not any(
        name.startswith(ADAPTER_KEYS) for name in fitted
    ):
        missing = []
    wrong = [
        f'{name} is {tuple(tensor.shape)}, not {shapes[name]}'
        for name, tensor in fitted.items()
        if tuple(tensor.shape) != shapes[name]
    ]
    problems = {'wrong shape': wrong, 'missing': missing, 'unexpected': unexpected}
    if any(problems.values()):
        raise ValueError('; '.join(f'{k}: {_first(v)}' for k, v in problems.items() if v))
    return fitted


def _fit_pos_embed(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Position embedding without class token, resized to (1, M * M, C) where only M differs."""
    if name.removeprefix(TRUNK_PREFIX) != POS_EMBED or tensor.dim() != 3:
        return tensor
    side = int(shape[1] ** 0.5)
    extra = tensor.shape[1] - int(tensor.shape[1] ** 0.5) ** 2
    return resize_pos_embed(tensor[:, extra:], (side, side))


def _first(names: list[str], count: int = 3) -> str:
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + more


def _describe(backbone: nn.Module) -> str:
    trunk = getattr(backbone, 'trunk', backbone)
    around = '' if trunk is backbone else f' in {type(backbone).__name__}'
    return f'{type(trunk).__name__} of {trunk.embed_dims} dims{around}'
