"""The networks that `benchmark_model.py` compares: ours, and what users would pick instead."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

SIZES = {'t': 'tiny', 's': 'small', 'b': 'base'}


@dataclass(frozen=True)
class Network:
    """A network that takes an image batch and returns a tuple of maps, or of logits.

    `ours` is compiled as one graph, and fails where that cannot be.
    """

    name: str
    build: Callable[[], nn.Module]
    ours: bool = False


class Classifier(nn.Module):
    """A trunk, its mean over pixels, and a linear layer for 1000 classes, as ViG classifies."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.embed_dims, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(B, 3, H, W) to logits (B, 1000)."""
        return (self.head(self.trunk(x)[-1].mean((2, 3))),)


class OneOutput(nn.Module):
    """A network that returns one tensor, as one that returns a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Whatever the network makes of (B, 3, H, W)."""
        return (self.network(x),)


def catalog() -> dict[str, Network]:
    """All networks that have a name."""
    networks = []
    for letter, arch in SIZES.items():
        networks += [
            Network(f'vig-{letter}-adapter', _adapter(arch, 'ViG'), ours=True),
            Network(f'vit-{letter}-adapter', _adapter(arch, 'TimmViT'), ours=True),
            Network(
                f'vit-{letter}-window-adapter', _adapter(arch, 'TimmViT', window_size=14), ours=True
            ),
            Network(f'vig-{letter}', _trunk('ViG', arch), ours=True),
            Network(f'vig-h-{letter}', _trunk('ViGH', arch), ours=True),
            Network(f'vit-{letter}', _trunk('TimmViT', arch), ours=True),
            Network(f'vig-{letter}-cls', lambda a=arch: Classifier(_trunk('ViG', a)()), ours=True),
            Network(f'deit-{letter}-cls', _timm(f'deit_{arch}_patch16_224')),
        ]
    networks += [
        Network('swin-t', _swin),
        Network('resnet50', _resnet),
        Network('convnext-t', _timm('convnext_tiny', features_only=True)),
        Network('convnext-b', _timm('convnext_base', features_only=True)),
    ]
    return {network.name: network for network in networks}


def from_config(file: str, options: dict | None = None) -> Network:
    """The backbone of a config file, `options` overriding its settings."""

    def build() -> nn.Module:
        cfg = Config.fromfile(file)
        cfg.merge_from_dict(options or {})
        init_default_scope(cfg.default_scope)
        return MODELS.build(cfg.model.backbone)

    backbone = Config.fromfile(file).model.backbone
    return Network(file, build, ours=backbone.type in ('ViG', 'ViGH', 'ViTAdapter', 'TimmViT'))


def make(network: Network, device: str, seed: int = 0) -> nn.Module:
    """The network on a device, with seeded random weights, none of which is asleep at 0."""
    torch.manual_seed(seed)
    module = revert_sync_batchnorm(network.build())
    for param in module.parameters():
        if param.requires_grad and not param.any():
            nn.init.normal_(param, std=0.02)
    return module.to(device)


def _trunk(kind: str, arch: str) -> Callable[[], nn.Module]:
    return lambda: MODELS.build(dict(type=kind, arch=arch))


def _adapter(arch: str, kind: str, **trunk: int) -> Callable[[], nn.Module]:
    heads = dict(deform_num_heads=12, deform_ratio=0.5) if arch == 'base' else {}
    trunk = dict(type=kind, arch=arch, **trunk)
    return lambda: MODELS.build(dict(type='ViTAdapter', trunk=trunk, **heads))


def _timm(name: str, features_only: bool = False) -> Callable[[], nn.Module]:
    if features_only:
        return lambda: timm.create_model(name, features_only=True)
    return lambda: OneOutput(timm.create_model(name))


def _swin() -> nn.Module:
    from mmdet.models import SwinTransformer

    return SwinTransformer(drop_path_rate=0.0)


def _resnet() -> nn.Module:
    from mmdet.models import ResNet

    return ResNet(50)
