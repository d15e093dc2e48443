"""Plain vision transformers of timm as trunks: the paper's baselines beside ViG."""

from collections import OrderedDict

import timm
import torch.nn.functional as F
from mmengine.registry import MODELS
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmvig.models.backbones.plain_trunk import PlainTrunk
from mmvig.models.utils import parse_arch

PATCH_SIZE = 16


@MODELS.register_module()
class TimmViT(PlainTrunk):
    """Plain ViT with timm's blocks and parameter names, without class token, stride 16.

    Loads DeiT's and timm's classification checkpoints; their class token is left out. Returns, for
    an image batch (B, in_channels, H, W), a map (B, C, H / 16, W / 16) per out index.

    Args:
        arch: 'tiny', 'small' or 'base', or `dict(model_name=...)` with a timm ViT of patch size 16.
        in_channels: Channels of the image.
        out_indices: Blocks whose output is returned; negative ones count from the last.
        final_norm: Whether the trunk has its final LayerNorm, applied to the last block's output.
        window_size: Side in tokens of attention windows; 0 is attention over all tokens.
        global_every: With windows, each block with this number attends over all tokens.
        drop_path_rate: Drop path of the last block; the others' rise linearly to it.
        frozen_stages: -1 trains everything; 0 freezes patch and position embedding; n also the
            first n blocks.
        with_cp: Recompute each block in the backward pass instead of keeping its activations.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE)`.

    Raises:
        ValueError: For an unknown arch, or an index out of range.
    """

    arch_zoo = {
        'tiny': dict(model_name='deit_tiny_patch16_224'),
        'small': dict(model_name='deit_small_patch16_224'),
        'base': dict(model_name='deit_base_patch16_224'),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: tuple[int, ...] = (-1,),
        final_norm: bool = True,
        window_size: int = 0,
        global_every: int = 3,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        vit = timm.create_model(
            parse_arch(arch, self.arch_zoo)['model_name'],
            in_chans=in_channels,
            drop_path_rate=drop_path_rate,
            num_classes=0,
            class_token=False,
            global_pool='avg',
            fc_norm=False,
        )
        self.window_size = window_size
        self.global_every = global_every
        super().__init__(
            embed_dims=vit.embed_dim,
            patch_embed=nn.Sequential(OrderedDict(proj=vit.patch_embed.proj)),
            pos_embed=vit.pos_embed,
            blocks=nn.ModuleList(vit.blocks),
            norm=vit.norm if final_norm else None,
            in_channels=in_channels,
            patch_size=PATCH_SIZE,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )

    def run_block(self, index: int, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Runs one block on tokens (B, N, C) of an h x w map."""
        block = self.blocks[index]
        if self.window_size == 0 or (index + 1) % self.global_every == 0:
            return block(x)
        return run_in_windows(block, x, hw, self.window_size)


def run_in_windows(block: Block, x: Tensor, hw: tuple[int, int], window_size: int) -> Tensor:
    """Runs timm's block with attention inside square windows.

    The map is padded with zero tokens, right and bottom, to whole windows; as in ViT-Adapter's
    and ViTDet's releases, the zero tokens take part in the attention of their window.

    Args:
        block: The block.
        x: (B, N, C) tokens.
        hw: Their grid, N = h * w.
        window_size: Side of a window in tokens.

    Returns:
        (B, N, C).
    """
    attended = _merge(block.attn(_partition(block.norm1(x), hw, window_size)), hw, window_size)
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _partition(x: Tensor, hw: tuple[int, int], size: int) -> Tensor:
    """(B, h * w, C) to (B * windows, size * size, C), padded to whole windows."""
    h, w = hw
    x = F.pad(x.unflatten(1, hw), (0, 0, 0, -w % size, 0, -h % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return x.transpose(2, 3).reshape(-1, size * size, x.shape[-1])


def _merge(windows: Tensor, hw: tuple[int, int], size: int) -> Tensor:
    """The inverse of `_partition`: (B * windows, size * size, C) to (B, h * w, C)."""
    h, w = hw
    rows, cols = -(-h // size), -(-w // size)
    x = windows.unflatten(1, (size, size)).unflatten(0, (-1, rows, cols)).transpose(2, 3)
    x = x.reshape(-1, rows * size, cols * size, windows.shape[-1])
    return x[:, :h, :w].flatten(1, 2)
