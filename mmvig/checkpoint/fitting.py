"""Official state dicts to ours: pure functions, dict to dict.

ViG's parameter names are the official ones. ViG-H's differ: it is made of ViG's blocks.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from mmvig.models.layers.embed import resize_pos_embed

# what a classification network has and a trunk for dense prediction has not
CLASSIFIER_KEYS = (
    'norm.',
    'head.',
    'classifier.',
    'fc_norm.',
    'cls_token',
    'dist_token',
    'head_dist.',
)
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
# norms of ViG-H's outputs, which only dense prediction has
OUT_NORM_KEYS = ('outnorm',)
TRUNK_PREFIX = 'trunk.'
POS_EMBED = 'pos_embed'
# official names of ViG-H, newer and older, and ours
VIG_H_MARK = 'layers.0.blocks.0.'
VIG_H_NAMES = [
    (re.compile(official), own)
    for official, own in (
        (r'^patch_embed\.0\.', 'patch_embed.conv1.'),
        (r'^patch_embed\.2\.', 'patch_embed.norm1.'),
        (r'^patch_embed\.5\.', 'patch_embed.conv2.'),
        (r'^patch_embed\.7\.', 'patch_embed.norm2.'),
        (r'^layers\.(\d+)\.downsample\.1\.', r'stages.\1.downsample.conv.'),
        (r'^layers\.(\d+)\.downsample\.3\.', r'stages.\1.downsample.norm.'),
        (r'^layers\.(\d+)\.blocks\.(\d+)\.(?:norm|ln_1)\.', r'stages.\1.blocks.\2.attn_norm.'),
        (r'^layers\.(\d+)\.blocks\.(\d+)\.(?:op|self_attention)\.', r'stages.\1.blocks.\2.attn.'),
        (r'^layers\.(\d+)\.blocks\.(\d+)\.norm2\.', r'stages.\1.blocks.\2.mlp_norm.'),
        (r'^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.', r'stages.\1.blocks.\2.mlp.gate_proj.'),
        (r'^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.', r'stages.\1.blocks.\2.mlp.down_proj.'),
    )
]


class Fitted(NamedTuple):
    """What `fit_state_dict` made of a state dict."""

    tensors: dict[str, Tensor]  # to load, by the backbone's names
    resized: list[str]  # position embeddings among them that had another size
    left_out: list[str]  # the state dict's names that the backbone has no place for


def own_names(names: Iterable[str]) -> dict[str, str]:
    """Our name of each parameter of an official state dict; other names stay as they are."""
    names = list(names)
    if not any(name.startswith(VIG_H_MARK) for name in names):
        return {name: name for name in names}
    return {name: _own_vig_h_name(name) for name in names}


def fit_state_dict(
    state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Fitted:
    """Fits a state dict to a backbone's parameters.

    A trunk inside an adapter takes its weights from `trunk.NAME` or, as in ViT-Adapter's flat
    layout, from `NAME`. The position embedding is resized. Left out may only be the final norm,
    norms of outputs, and the classifier's head; missing may only be the adapter, or the norms of
    ViG-H's outputs, each as a whole.

    Args:
        state_dict: Tensors by official or own name.
        shapes: The backbone's names and shapes.

    Raises:
        ValueError: If anything else is missing, unexpected or of another shape.
    """
    fitted = Fitted({}, [], [])
    unexpected = []
    for name, renamed in own_names(state_dict).items():
        own = renamed if renamed in shapes else TRUNK_PREFIX + renamed
        if own in shapes:
            fitted.tensors[own] = _fit_pos_embed(own, state_dict[name], shapes[own])
            if fitted.tensors[own].shape != state_dict[name].shape:
                fitted.resized.append(own)
        elif renamed.startswith(CLASSIFIER_KEYS + OUT_NORM_KEYS):
            fitted.left_out.append(name)
        else:
            unexpected.append(name)
    problems = {
        'wrong shape': [
            f'{name} is {tuple(tensor.shape)}, not {shapes[name]}'
            for name, tensor in fitted.tensors.items()
            if tuple(tensor.shape) != shapes[name]
        ],
        'missing': _missing(fitted.tensors, shapes),
        'unexpected': unexpected,
    }
    if any(problems.values()):
        raise ValueError('; '.join(f'{k}: {first(v)}' for k, v in problems.items() if v))
    return fitted


def first(names: list[str], count: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + more


def _own_vig_h_name(name: str) -> str:
    for official, own in VIG_H_NAMES:
        renamed, count = official.subn(own, name)
        if count:
            return renamed
    return name


def _missing(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The backbone's names without a tensor; a part that may be missing as a whole does not count.

    Args:
        tensors: What there is.
        shapes: What there must be.
    """
    missing = [name for name in shapes if name not in tensors]
    for optional in (ADAPTER_KEYS, OUT_NORM_KEYS):
        if not any(name.startswith(optional) for name in tensors):
            missing = [name for name in missing if not name.startswith(optional)]
    return missing


def _fit_pos_embed(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Position embedding without class token, resized to (1, M * M, C) where only M differs."""
    is_pos_embed = name.removeprefix(TRUNK_PREFIX) == POS_EMBED and tensor.dim() == 3
    if not is_pos_embed or tensor.shape[::2] != shape[::2] or tensor.shape[1] == 0:
        return tensor
    side = int(shape[1] ** 0.5)
    extra = tensor.shape[1] - int(tensor.shape[1] ** 0.5) ** 2
    return resize_pos_embed(tensor[:, extra:], (side, side))
