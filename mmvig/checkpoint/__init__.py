"""Checkpoints of others, and our own, into our backbones: strictly, or with one clear error.

`reading` gets tensors out of a file and executes nothing that it holds (`inert`; `harmful` lists
what makes it refuse a file), `fitting` renames and checks them (pure functions, dict to dict),
`arch` tells which network they are of, and `loading` puts them into a backbone.
"""

from mmvig.checkpoint.arch import Arch, guess_arch
from mmvig.checkpoint.fitting import fit_state_dict, own_names
from mmvig.checkpoint.loading import init_pretrained, load_pretrained, load_weights
from mmvig.checkpoint.reading import (
    find_state_dict,
    read_checkpoint,
    text_kind,
    weights_key,
)

__all__ = [
    'Arch',
    'find_state_dict',
    'fit_state_dict',
    'guess_arch',
    'init_pretrained',
    'load_pretrained',
    'load_weights',
    'own_names',
    'read_checkpoint',
    'text_kind',
    'weights_key',
]
