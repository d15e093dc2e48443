"""ViG, plain: gated linear attention at one resolution, stride 16 (arXiv 2405.18425)."""

from collections.abc import Callable
from functools import partial

import torch
from mmengine.registry import MODELS
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvig.models.backbones.plain_trunk import PlainTrunk
from mmvig.models.layers.block import FusedForm, cast_blocks_ahead
from mmvig.models.layers.embed import ConvPatchEmbed
from mmvig.models.layers.ffn import SwiGLU
from mmvig.models.layers.hooks import has_hooks
from mmvig.models.layers.mixer import BiGLAMixer
from mmvig.models.layers.mixer_roadmap import RoadmapMixer
from mmvig.models.layers.norm import RMSNorm, Stream, add, draw_keep
from mmvig.models.utils import drop_path_rates, parse_arch

PATCH_SIZE = 16
EPS = 1e-6
RMS_NORM = partial(RMSNorm, eps=EPS)


class ViGBlock(nn.Module):
    """`x + mixer(norm(x))`, then `x + swiglu(norm(x))`, drop path on both branches.

    Args:
        embed_dims: C.
        num_heads: Heads of the mixer.
        mlp_dims: Hidden channels of the SwiGLU.
        conv_act, out_act: See `BiGLAMixer`.
        drop_path: Probability that a sample skips a branch.
        norm_layer: Makes the norm of C channels before each branch.
        scan: None for ViG's mixer, or the `RoadmapMixer`'s.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_dims: int,
        conv_act: bool = False,
        out_act: bool = False,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = RMS_NORM,
        scan: str | None = None,
    ) -> None:
        super().__init__()
        self.attn_norm = norm_layer(embed_dims)
        if scan is None:
            self.attn = BiGLAMixer(embed_dims, num_heads, conv_act, out_act)
        else:
            self.attn = RoadmapMixer(embed_dims, num_heads, scan)
        self.mlp_norm = norm_layer(embed_dims)
        self.mlp = SwiGLU(embed_dims, mlp_dims)
        self.drop_path = DropPath(drop_path)
        self._fused = FusedForm()

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) tokens of an h x w map to (B, N, C)."""
        return add(*self.run(x, None, None, hw))

    def run(
        self, x: Tensor, y: Tensor | None, keep: Tensor | None, hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The block but for its last addition, after the addition that the block before left.

        Args:
            x: (B, N, C), the residual stream.
            y: (B, N, C), to be added to it; or None.
            keep: (B,), factors of y, which drop path has drawn; or None.
            hw: The map's height and width in tokens.

        Returns:
            x, y and keep for the next block.
        """
        drop, next_keep = draw_keep(x, self.drop_path, branches=2)
        fused = self._fused(self, x, y, keep, drop, hw)
        if fused is not None:
            return *fused, next_keep
        x, normed = self.attn_norm.add(x, y, keep)
        x, normed = self.mlp_norm.add(x, self.attn(normed, hw), drop)
        return x, self.mlp(normed), next_keep


def chained_form(block: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    """A block's `run`; the same by its `forward` where hooks or a wrapper want to see that."""
    if type(block) is ViGBlock and not has_hooks(block):
        return block.run

    def run(
        x: Tensor, y: Tensor | None, keep: Tensor | None, hw: tuple[int, int]
    ) -> tuple[Tensor, None, None]:
        return block(x if y is None else add(x, y, keep), hw), None, None

    return run


@MODELS.register_module()
class ViG(PlainTrunk):
    """ViG trunk for dense prediction, at any image size, in time and memory linear in its area.

    Source: arXiv 2405.18425; layers and parameter names as in its official classification code.
    Returns, for an image batch (B, in_channels, H, W), a map (B, C, H / 16, W / 16) per out index.

    Args:
        arch: 'tiny', 'small' or 'base', or a dict with the keys of `ViG.arch_zoo`'s entries.
        in_channels: Channels of the image.
        pretrain_size: Side in pixels of the images that the position embedding is learned on.
        out_indices: Blocks whose output is returned; negative ones count from the last.
        final_norm: Whether the trunk has its final RMSNorm, applied to the last block's output.
        drop_path_rate: Drop path of the last block; the others' rise linearly to it.
        frozen_stages: -1 trains everything; 0 freezes patch and position embedding; n also the
            first n blocks.
        with_cp: Recompute each block in the backward pass instead of keeping its activations.
        scan: For the paper's ablations: a mixer without locality injection, see `RoadmapMixer`.
        patch_embed: 'overlap', or for the ablations 'plain', one 16x16 conv without overlap.
        with_pos_embed: Whether there is a position embedding; the ablations also leave it out.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE)` for official or own weights.

    Raises:
        ValueError: For an unknown arch, scan or patch embedding, an index out of range, heads that
            do not divide dims.
    """

    arch_zoo = {
        'tiny': dict(
            embed_dims=192, depth=12, num_heads=3, mlp_dims=512, conv_act=True, out_act=True
        ),
        'small': dict(
            embed_dims=384, depth=12, num_heads=6, mlp_dims=1024, conv_act=False, out_act=False
        ),
        'base': dict(
            embed_dims=768, depth=12, num_heads=12, mlp_dims=2048, conv_act=False, out_act=False
        ),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        pretrain_size: int = 224,
        out_indices: tuple[int, ...] = (-1,),
        final_norm: bool = True,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        scan: str | None = None,
        patch_embed: str = 'overlap',
        with_pos_embed: bool = True,
        init_cfg: dict | None = None,
    ) -> None:
        settings = parse_arch(arch, self.arch_zoo)
        dims, depth = settings['embed_dims'], settings.pop('depth')
        rates = drop_path_rates(drop_path_rate, depth)
        num_positions = (pretrain_size // PATCH_SIZE) ** 2
        super().__init__(
            embed_dims=dims,
            patch_embed=_patch_embed(patch_embed, in_channels, dims),
            pos_embed=nn.Parameter(torch.zeros(1, num_positions, dims)) if with_pos_embed else None,
            blocks=nn.ModuleList(ViGBlock(**settings, drop_path=rate, scan=scan) for rate in rates),
            norm=RMS_NORM(dims) if final_norm else None,
            in_channels=in_channels,
            patch_size=PATCH_SIZE,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self._reset_parameters()

    def forward_blocks(self, x: Tensor, hw: tuple[int, int], start: int, stop: int) -> Tensor:
        """Runs blocks start ... stop - 1 on tokens (B, N, C) of an h x w map."""
        return self.run_stream(Stream(x), hw, start, stop).sum()

    def run_stream(self, x: Stream, hw: tuple[int, int], start: int, stop: int) -> Stream:
        """`forward_blocks` of a stream; the last block's addition is left to what follows."""
        x, y, keep = x
        recomputes = self.with_cp and torch.is_grad_enabled()
        blocks = self.blocks[start:stop]
        forms = [(b, b._fused) for b in blocks if type(b) is ViGBlock and not recomputes]
        with cast_blocks_ahead(forms, x):
            for run in map(chained_form, blocks):
                if recomputes:
                    x, y, keep = checkpoint(run, x, y, keep, hw, use_reentrant=False)
                else:
                    x, y, keep = run(x, y, keep, hw)
        return Stream(x, y, keep)

    def _reset_parameters(self) -> None:
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _patch_embed(kind: str, in_channels: int, embed_dims: int) -> nn.Module:
    if kind == 'overlap':
        return ConvPatchEmbed(in_channels, embed_dims)
    if kind == 'plain':
        return nn.Conv2d(in_channels, embed_dims, PATCH_SIZE, stride=PATCH_SIZE)
    raise ValueError(f"patch_embed must be 'overlap' or 'plain', got {kind!r}")
