"""What every plain trunk shares: one resolution, a position embedding, a row of blocks.

Shape legend: B batch, C channels, (h, w) token grid, N = h * w tokens, (H, W) image.
"""

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvig.checkpoint import init_pretrained
from mmvig.models.layers.embed import (
    PosEmbedResizer,
    check_image,
    pad_to_multiple,
    to_conv_input,
    to_map,
    to_tokens,
)
from mmvig.models.layers.norm import Stream
from mmvig.models.utils import ascending_indices


class PlainTrunk(BaseModule):
    """Image to tokens to tokens, in `depth` blocks of one resolution.

    `ViTAdapter` needs `embed`, `run_stream`, `embed_dims`, `blocks`, `in_channels` and
    `drop_path_rate` of a trunk, and no more.

    Args:
        embed_dims: C.
        patch_embed: (B, in_channels, H, W) to (B, C, H / patch_size, W / patch_size).
        pos_embed: (1, M * M, C), learned on a square grid, or None.
        blocks: The blocks; `run_block` says how one is called.
        norm: Final norm on tokens, or None.
        in_channels: Channels of the image.
        patch_size: Side of a patch in pixels.
        out_indices: Blocks whose output is returned; negative ones count from the last.
        drop_path_rate: Drop path of the last block.
        frozen_stages: -1 trains everything; 0 freezes patch and position embedding; n also the
            first n blocks.
        with_cp: Recompute each block in the backward pass instead of keeping its activations.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE)`.

    Raises:
        ValueError: For an index out of range, or more frozen stages than blocks.
    """

    def __init__(
        self,
        embed_dims: int,
        patch_embed: nn.Module,
        pos_embed: nn.Parameter | None,
        blocks: nn.ModuleList,
        norm: nn.Module | None,
        in_channels: int,
        patch_size: int,
        out_indices: tuple[int, ...],
        drop_path_rate: float,
        frozen_stages: int,
        with_cp: bool,
        init_cfg: dict | None,
    ) -> None:
        super().__init__(init_cfg)
        depth = len(blocks)
        if not -1 <= frozen_stages <= depth:
            raise ValueError(
                f'frozen_stages ({frozen_stages}) must be from -1 to {depth}, the depth'
            )
        self.embed_dims = embed_dims
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.out_indices = ascending_indices(out_indices, depth, 'blocks')
        self.drop_path_rate = drop_path_rate
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.patch_embed = patch_embed
        self.pos_embed = pos_embed
        self._resize_pos_embed = PosEmbedResizer()
        self.blocks = blocks
        self.norm = norm
        self._freeze()

    convert_image = staticmethod(to_conv_input)  # for CUDA graphs, before `forward`

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each map that is returned."""
        return (self.embed_dims,) * len(self.out_indices)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image batch (B, in_channels, H, W) to a map (B, C, h, w) per out index.

        h and w are H and W by the patch size, rounded up (zeros are added right and bottom). The
        maps are channels last in memory.

        Raises:
            ValueError: For other channels, or an image smaller than a patch.
        """
        x, hw = self.embed(x)
        outs, start = [], 0
        for index in self.out_indices:
            x = self.forward_blocks(x, hw, start, index + 1)
            start = index + 1
            is_last = start == len(self.blocks)
            outs.append(to_map(self.norm(x) if self.norm and is_last else x, hw))
        return tuple(outs)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image batch (B, in_channels, H, W) to tokens (B, N, C) with positions, and (h, w)."""
        check_image(x, self.in_channels, self.patch_size)
        x = self.patch_embed(to_conv_input(pad_to_multiple(x, self.patch_size)))
        hw = (x.shape[2], x.shape[3])
        x = to_tokens(x)
        return x if self.pos_embed is None else x + self._resize_pos_embed(self.pos_embed, hw), hw

    def forward_blocks(self, x: Tensor, hw: tuple[int, int], start: int, stop: int) -> Tensor:
        """Runs blocks start … stop - 1 on tokens (B, N, C) of an h x w map."""
        for index in range(start, stop):
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(self.run_block, index, x, hw, use_reentrant=False)
            else:
                x = self.run_block(index, x, hw)
        return x

    def run_stream(self, x: Stream, hw: tuple[int, int], start: int, stop: int) -> Stream:
        """`forward_blocks` of a stream, where additions before and after the blocks may be left."""
        return Stream(self.forward_blocks(x.sum(), hw, start, stop))

    def run_block(self, index: int, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Runs one block on tokens (B, N, C) of an h x w map."""
        return self.blocks[index](x, hw)

    def init_weights(self) -> None:
        """Loads the checkpoint that `init_cfg` names, if it names one."""
        if not init_pretrained(self):
            super().init_weights()

    def train(self, mode: bool = True) -> 'PlainTrunk':
        """Sets the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer of a parameter for layer-wise learning-rate decay, and the number of layers.

        The embeddings are layer 0, block i is layer i + 1, the final norm is the last.
        """
        num_layers = len(self.blocks) + 2
        name = param_name.removeprefix(prefix)
        if name.startswith(('pos_embed', 'patch_embed')):
            return 0, num_layers
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) + 1, num_layers
        return num_layers - 1, num_layers

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)
        for module in (self.patch_embed, *self.blocks[: self.frozen_stages]):
            module.eval()
            module.requires_grad_(False)
