"""Which network a state dict is of, told from its names and shapes."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from mmengine.registry import MODELS

from mmvig.checkpoint.fitting import ADAPTER_KEYS, TRUNK_PREFIX, own_names

Shapes = Mapping[str, tuple[int, ...]]

PLAIN_BLOCK = re.compile(r'blocks\.(\d+)\.')
STAGE_BLOCK = re.compile(r'stages\.(\d+)\.blocks\.(\d+)\.')
VIG_KEY = 'blocks.0.attn.gk_proj.0.weight'
VIT_KEY = 'blocks.0.attn.qkv.weight'
VIG_H_KEY = f'stages.0.{VIG_KEY}'
# by dims and depth, which timm knows only once the model is built
VIT_NAMES = {(192, 12): 'tiny', (384, 12): 'small', (768, 12): 'base'}


class Arch(NamedTuple):
    """A network: registered type of its trunk, sizes, and its name where it has one."""

    type: str
    embed_dims: int | tuple[int, ...]
    depth: int | tuple[int, ...]
    name: str | None
    in_adapter: bool

    def __str__(self) -> str:
        trunk = f'{self.type} {self.name}'
        if self.name is None:
            trunk = f'{self.type} of {self.embed_dims} dims and {self.depth} blocks'
        return f'{trunk} in ViTAdapter' if self.in_adapter else trunk


def guess_arch(shapes: Shapes) -> Arch | None:
    """Tells a network by the names and shapes of its state dict, official or ours.

    Args:
        shapes: Shape by name.

    Returns:
        The network, or None where it is none of ours.
    """
    shapes = {own: shapes[name] for name, own in own_names(shapes).items()}
    in_adapter = any(name.startswith(ADAPTER_KEYS) for name in shapes)
    shapes = {name.removeprefix(TRUNK_PREFIX): shape for name, shape in shapes.items()}
    depth = _count(PLAIN_BLOCK, shapes)
    if dims := _dims(shapes, VIG_KEY):
        name = _name('ViG', embed_dims=dims, depth=depth)
        return Arch('ViG', dims, depth, name, in_adapter)
    if dims := _dims(shapes, VIT_KEY):
        return Arch('TimmViT', dims, depth, VIT_NAMES.get((dims, depth)), in_adapter)
    if _dims(shapes, VIG_H_KEY):
        blocks = {m.groups() for m in map(STAGE_BLOCK.match, shapes) if m}
        counts = sorted(Counter(int(stage) for stage, _ in blocks).items())
        depths = tuple(count for _, count in counts)
        dims = tuple(_dims(shapes, f'stages.{stage}.{VIG_KEY}') for stage, _ in counts)
        return Arch('ViGH', dims, depths, _name('ViGH', embed_dims=dims, depths=depths), False)
    return None


def _dims(shapes: Shapes, key: str) -> int:
    """Channels that a linear layer reads; 0 where there is no such layer."""
    shape = shapes.get(key, ())
    return shape[1] if len(shape) == 2 else 0


def _count(block: re.Pattern, shapes: Shapes) -> int:
    return len({m.group(1) for m in map(block.match, shapes) if m})


def _name(type_: str, **sizes: int | tuple[int, ...]) -> str | None:
    """Name of the arch in the zoo of a registered backbone that has these sizes."""
    zoo = MODELS.get(type_).arch_zoo
    return next((n for n, arch in zoo.items() if arch.items() >= sizes.items()), None)
