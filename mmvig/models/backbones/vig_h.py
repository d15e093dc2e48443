"""ViG-H: ViG's blocks in four stages of strides 4, 8, 16 and 32 (arXiv 2405.18425)."""

from collections import OrderedDict
from functools import partial
from itertools import islice

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvig.checkpoint import init_pretrained
from mmvig.models.backbones.vig import ViGBlock
from mmvig.models.layers.embed import check_image, to_conv_input, to_map, to_tokens
from mmvig.models.layers.norm import LayerNorm
from mmvig.models.utils import ascending_indices, drop_path_rates, parse_arch

EPS = 1e-5
NUM_STAGES = 4
STEM_STRIDE = 4


class Stage(nn.Module):
    """Blocks of one resolution, and the down-sampling to the next; the last stage has none.

    Args:
        embed_dims: C.
        num_heads: Heads of the mixers.
        mlp_dims: Hidden channels of the SwiGLUs.
        drop_paths: Drop path of each block; their number is the stage's depth.
        out_dims: Channels after the down-sampling, or None for no down-sampling.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_dims: int,
        drop_paths: list[float],
        out_dims: int | None,
    ) -> None:
        super().__init__()
        # on tokens, where the channels come last, this is the paper's channels-first LayerNorm
        norm_layer = partial(LayerNorm, eps=EPS)
        self.blocks = nn.ModuleList(
            ViGBlock(embed_dims, num_heads, mlp_dims, drop_path=rate, norm_layer=norm_layer)
            for rate in drop_paths
        )
        self.downsample = None
        if out_dims:
            conv = nn.Conv2d(embed_dims, out_dims, 3, stride=2, padding=1)
            norm = LayerNorm2d(out_dims, eps=EPS)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=norm))


@MODELS.register_module()
class ViGH(BaseModule):
    """Hierarchical ViG, at any image size; a backbone for FPN and UPerHead as Swin is.

    Source: arXiv 2405.18425, and its official classification code. Returns, for an image batch
    (B, in_channels, H, W), a map (B, C_i, H / s, W / s) per out index, s = 4, 8, 16, 32; sides are
    rounded up. Each output has a LayerNorm of its own, as Swin has for dense prediction, which
    classification checkpoints lack: it starts as the identity.

    Args:
        arch: 'tiny', 'small' or 'base', or a dict with the keys of `ViGH.arch_zoo`'s entries.
        in_channels: Channels of the image.
        out_indices: Stages whose output is returned, ascending. What comes after the last is not
            run, and not trained: DistributedDataParallel takes parameters without gradient amiss.
        drop_path_rate: Drop path of the last block; the others' rise linearly to it.
        frozen_stages: -1 trains everything; 0 freezes the stem; n also the first n stages, each
            with the down-sampling that follows it. The norms of the outputs are always trained.
        with_cp: Recompute each block in the backward pass instead of keeping its activations.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE)` for official or own weights.

    Raises:
        ValueError: For an unknown arch, an index out of range, heads that do not divide dims.
    """

    arch_zoo = {
        'tiny': dict(
            embed_dims=(96, 192, 384, 768),
            depths=(2, 2, 5, 2),
            num_heads=(3, 6, 12, 24),
            mlp_dims=(256, 512, 1024, 2048),
        ),
        'small': dict(
            embed_dims=(96, 192, 384, 768),
            depths=(2, 2, 17, 2),
            num_heads=(3, 6, 12, 24),
            mlp_dims=(256, 512, 1024, 2048),
        ),
        'base': dict(
            embed_dims=(128, 256, 512, 1024),
            depths=(2, 2, 17, 2),
            num_heads=(4, 8, 16, 32),
            mlp_dims=(352, 704, 1376, 2752),
        ),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        settings = parse_arch(arch, self.arch_zoo)
        if bad := {k: v for k, v in settings.items() if len(v) != NUM_STAGES}:
            raise ValueError(
                f'arch needs {NUM_STAGES} values, one a stage, for each key, got {bad}'
            )
        if not -1 <= frozen_stages <= NUM_STAGES:
            raise ValueError(f'frozen_stages ({frozen_stages}) must be from -1 to {NUM_STAGES}')
        self.in_channels = in_channels
        self.embed_dims = tuple(settings['embed_dims'])
        self.depths = tuple(settings['depths'])
        self.out_indices = ascending_indices(out_indices, NUM_STAGES, 'stages')
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.patch_embed = _stem(in_channels, self.embed_dims[0])
        rates = iter(drop_path_rates(drop_path_rate, sum(self.depths)))
        self.stages = nn.ModuleList(
            Stage(
                self.embed_dims[i],
                settings['num_heads'][i],
                settings['mlp_dims'][i],
                list(islice(rates, self.depths[i])),
                self.embed_dims[i + 1] if i + 1 < NUM_STAGES else None,
            )
            for i in range(NUM_STAGES)
        )
        for index in self.out_indices:
            self.add_module(f'outnorm{index}', nn.LayerNorm(self.embed_dims[index], eps=EPS))
        self._reset_parameters()
        self._freeze()

    convert_image = staticmethod(to_conv_input)  # for CUDA graphs, before `forward`

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each map that is returned."""
        return tuple(self.embed_dims[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image batch (B, in_channels, H, W) to a map (B, C_i, h_i, w_i) per out index.

        The maps are channels last in memory.

        Raises:
            ValueError: For other channels, or an image smaller than a patch of the stem.
        """
        check_image(x, self.in_channels, STEM_STRIDE)
        x = self.patch_embed(to_conv_input(x))
        outs = []
        for index in range(self.out_indices[-1] + 1):
            stage, hw = self.stages[index], (x.shape[2], x.shape[3])
            tokens = self._run_blocks(stage, to_tokens(x), hw)
            if index in self.out_indices:
                norm = getattr(self, f'outnorm{index}')
                outs.append(to_map(norm(tokens), hw))
            if index < self.out_indices[-1]:
                x = stage.downsample(to_map(tokens, hw))
        return tuple(outs)

    def _run_blocks(self, stage: Stage, x: Tensor, hw: tuple[int, int]) -> Tensor:
        for block in stage.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, hw, use_reentrant=False)
            else:
                x = block(x, hw)
        return x

    def init_weights(self) -> None:
        """Loads the checkpoint that `init_cfg` names, if it names one."""
        if not init_pretrained(self):
            super().init_weights()

    def train(self, mode: bool = True) -> 'ViGH':
        """Sets the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer of a parameter for layer-wise learning-rate decay, and the number of layers.

        The stem is layer 0, and the blocks of all stages count on from 1. A down-sampling belongs
        to the block before it; the norms of the outputs are the last layer.
        """
        num_layers = sum(self.depths) + 2
        name = param_name.removeprefix(prefix)
        if name.startswith('patch_embed.'):
            return 0, num_layers
        if name.startswith('stages.'):
            _, stage, part, block, *_ = name.split('.')
            before = sum(self.depths[: int(stage)])
            in_stage = int(block) + 1 if part == 'blocks' else self.depths[int(stage)]
            return before + in_stage, num_layers
        return num_layers - 1, num_layers

    def _freeze(self) -> None:
        last = self.out_indices[-1]
        for module in (self.stages[last].downsample, *self.stages[last + 1 :]):
            if module is not None:
                module.requires_grad_(False)
        if self.frozen_stages < 0:
            return
        for module in (self.patch_embed, *self.stages[: self.frozen_stages]):
            module.eval()
            module.requires_grad_(False)

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _stem(in_channels: int, embed_dims: int) -> nn.Sequential:
    """(B, in_channels, H, W) to (B, C, H / 4, W / 4) in two overlapping convs."""
    mid = embed_dims // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, mid, 3, stride=2, padding=1),
            norm1=LayerNorm2d(mid, eps=EPS),
            act=nn.GELU(),
            conv2=nn.Conv2d(mid, embed_dims, 3, stride=2, padding=1),
            norm2=LayerNorm2d(embed_dims, eps=EPS),
        )
    )
