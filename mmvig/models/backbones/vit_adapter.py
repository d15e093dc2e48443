"""ViT-Adapter around a plain trunk: four maps for detection and segmentation.

Shape legend: B batch, C channels, (H, W) image, (h, w) the trunk's token grid, N = h * w tokens,
S tokens of the three levels of strides 8, 16 and 32, concatenated.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvig.checkpoint import init_pretrained
from mmvig.kernels import finest_map, resized_sum
from mmvig.kernels.dispatch import HALVES, form, working_dtype
from mmvig.models.layers.conv import PointConv2d
from mmvig.models.layers.deform_attn import Levels, make_levels
from mmvig.models.layers.embed import (
    check_image,
    concatenate,
    pad_to_multiple,
    to_conv_input,
    to_map,
    to_tokens,
)
from mmvig.models.layers.hooks import has_hooks
from mmvig.models.layers.interaction import Extractor, Injector, Interaction
from mmvig.models.layers.kept import Kept, cast
from mmvig.models.layers.linear import cast_ahead
from mmvig.models.layers.norm import Stream, given_statistics, normalize_batch
from mmvig.models.layers.spatial_prior import SpatialPriorModule, init_conv
from mmvig.models.utils import ascending_indices

STRIDES = (4, 8, 16, 32)


@MODELS.register_module()
class ViTAdapter(BaseModule):
    """Wraps a plain trunk and returns maps of strides 4, 8, 16 and 32, each with C channels.

    A spatial prior module makes a pyramid of the image; in a few interactions, spread over the
    blocks, deformable attention carries it into the tokens and the tokens back into it. Source:
    ViT-Adapter (arXiv 2205.08534); parameter names as in its release.

    Args:
        trunk: Config of a `PlainTrunk`, such as `dict(type='ViG', arch='tiny')`; it is built
            without its final norm. Its drop path rate also serves the extractors.
        deform_num_heads: Heads of deformable attention.
        deform_ratio: Value channels of deformable attention, as a share of C.
        n_points: Samples that a query takes from each level.
        conv_inplane: Channels of the spatial prior's stem.
        cffn_ratio: Hidden channels of the extractors' feed-forward network, as a share of C.
        interaction_indexes: First and last block of each interaction.
        num_extra_extractors: Further extractors in the last interaction.
        token_maps: What is added to the outputs: 'last' adds the trunk's last tokens to all four
            (detection), 'each' those after interaction i to output i (segmentation).
        out_indices: Outputs that are returned, ascending; 0 to 3 are strides 4 to 32. Layers that
            only others need are left out, so that every parameter is trained.
        norm_cfg: Batch norm of the spatial prior and the outputs.
        with_cp: Recompute injectors and extractors in the backward pass; the trunk has its own.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE)` for weights of trunk and adapter in
            ours or ViT-Adapter's flat layout, or of the trunk alone.

    Raises:
        ValueError: For a trunk that is no config or not plain, or a setting that does not fit it.
    """

    def __init__(
        self,
        trunk: dict,
        deform_num_heads: int = 6,
        deform_ratio: float = 1.0,
        n_points: int = 4,
        conv_inplane: int = 64,
        cffn_ratio: float = 0.25,
        interaction_indexes: tuple[tuple[int, int], ...] = ((0, 2), (3, 5), (6, 8), (9, 11)),
        num_extra_extractors: int = 2,
        token_maps: str = 'last',
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        norm_cfg: dict = dict(type='SyncBN', requires_grad=True),  # noqa: B006
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.trunk = MODELS.build(dict(_check_trunk(trunk), final_norm=False))
        self.interaction_indexes = _check_interactions(interaction_indexes, len(self.trunk.blocks))
        self.token_maps = _check_token_maps(token_maps, len(interaction_indexes))
        self.out_indices = ascending_indices(out_indices, len(STRIDES), 'outputs')
        self.with_cp = with_cp

        dims = self.trunk.embed_dims
        deform = (dims, deform_num_heads, n_points, deform_ratio)

        def extractor() -> Extractor:
            return Extractor(*deform, cffn_ratio, self.trunk.drop_path_rate)

        self.level_embed = nn.Parameter(torch.randn(3, dims))
        with_finest = 0 in self.out_indices
        self.spm = SpatialPriorModule(
            self.trunk.in_channels, dims, conv_inplane, norm_cfg, with_finest
        )
        num_extra = [0] * (len(interaction_indexes) - 1) + [num_extra_extractors]
        self.interactions = nn.ModuleList(
            Interaction(Injector(*deform), extractor(), [extractor() for _ in range(n)])
            for n in num_extra
        )
        self.up = nn.ConvTranspose2d(dims, dims, 2, 2) if with_finest else None
        self._kept_up, self._kept_finest = Kept(cast), Kept(_cast_finest)
        for i in self.out_indices:
            self.add_module(f'norm{i + 1}', build_norm_layer(norm_cfg, dims)[1])
        self._reset_parameters()

    convert_image = staticmethod(to_conv_input)  # for CUDA graphs, before `forward`

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each map that is returned."""
        return (self.trunk.embed_dims,) * len(self.out_indices)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image batch (B, in_channels, H, W) to a map (B, C, H / s, W / s) per out index.

        Strides s are 4, 8, 16 and 32; sides are rounded up where they are no multiples of one. The
        maps are channels last in memory and, under autocast, of its dtype.

        Raises:
            ValueError: For other channels, or an image smaller than a patch.
        """
        check_image(x, self.trunk.in_channels, self.trunk.patch_size)
        sizes = [(-(-x.shape[2] // s), -(-x.shape[3] // s)) for s in STRIDES]
        x = to_conv_input(pad_to_multiple(x, STRIDES[-1]))

        fuses = self._fuses_finest(x)
        maps = list(self.spm(x, self.level_embed, project_finest=not fuses))
        c1 = maps.pop(0)  # `c1, *maps = ...` makes a tuple under torch.compile of PyTorch 2.11
        pyramid = make_levels([(m.shape[2], m.shape[3]) for m in maps], x.device)
        # the pyramid's residual stream: float32, in inference in bfloat16 that, for half the bytes
        dtype = working_dtype(x)
        if torch.is_grad_enabled() or dtype != torch.bfloat16:
            dtype = torch.promote_types(dtype, self.level_embed.dtype)
        x, hw = self.trunk.embed(x)
        with self._cast_ahead(x):
            c, tokens = self._interact(x, hw, maps, dtype, pyramid)

        # once; transposed conv, and convs behind the backbone, would do so
        c = c.sum(working_dtype(c.x))
        levels = zip(c.split(pyramid.sizes, 1), pyramid.shapes, strict=True)
        maps = [to_map(level, hw) for level, hw in levels]
        outs = []
        for i in self.out_indices:
            last = to_map(tokens[i if self.token_maps == 'each' else -1], hw)
            if i == 0 and fuses:
                out = self._finest(maps[0], c1, last)
            else:
                out = self._output(i, maps, c1, last)
            out = out[:, :, : sizes[i][0], : sizes[i][1]]
            outs.append(out.contiguous(memory_format=torch.channels_last))
        return tuple(outs)

    def _output(self, i: int, maps: list[Tensor], c1: Tensor | None, tokens: Tensor) -> Tensor:
        """Output i of the pyramid's maps, the finest of which is made here, and the tokens' map."""
        x, y, bias = maps[i - 1], None, None
        if i == 0:
            x, bias = self._upsample(maps[0])
            y = c1
        norm = getattr(self, f'norm{i + 1}')
        given = given_statistics(norm)
        if given is not None and not torch.is_grad_enabled():
            return resized_sum(x, tokens, y, bias, given, norm.eps)
        return normalize_batch(norm, resized_sum(x, tokens, y, bias))

    def _fuses_finest(self, x: Tensor) -> bool:
        """Whether `_finest` serves: in inference on a GPU, in half precision, nobody looking on."""
        if self.up is None or torch.is_grad_enabled() or form(x) != 'eager':
            return False
        half = working_dtype(x) in HALVES
        own = type(self.up) is nn.ConvTranspose2d and type(self.spm.fc1) is PointConv2d
        watched = has_hooks(self.up) or has_hooks(self.spm.fc1)
        return half and own and not watched and given_statistics(self.norm1) is not None

    def _finest(self, x: Tensor, c1: Tensor, tokens: Tensor) -> Tensor:
        """Output 0 of the map of stride 8, and the spatial prior's of stride 4 before `fc1`."""
        up, fc1 = self.up, self.spm.fc1
        made = self._kept_finest(x.dtype, up.weight, fc1.weight, up.bias, fc1.bias)
        product, projection, bias = made
        # a level of the pyramid has gaps between images: one product each needs no copy of it
        rows = x.permute(0, 2, 3, 1)
        x = torch.bmm(rows.flatten(1, 2), product.t().expand(len(x), -1, -1))
        x = x.view(*rows.shape[:3], -1)
        norm, given = self.norm1, given_statistics(self.norm1)
        return finest_map(x, c1, projection, tokens, bias, given, norm.eps)

    def _upsample(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Twice the size, by `self.up`; its bias, where that is still to be added."""
        if form(x) != 'eager' or has_hooks(self.up):
            return self.up(x), None
        weight = self.up.weight
        if torch.is_grad_enabled():
            weight = weight.to(dtype=x.dtype, memory_format=torch.channels_last)
        else:
            (weight,) = self._kept_up(x.dtype, weight)
        return F.conv_transpose2d(x, weight, stride=self.up.stride), self.up.bias

    def _interact(
        self,
        x: Tensor,
        hw: tuple[int, int],
        maps: list[Tensor],
        dtype: torch.dtype,
        pyramid: Levels,
    ) -> tuple[Stream, list[Tensor]]:
        """Runs trunk and interactions: the pyramid (B, S, C), and the tokens the outputs need.

        Empties the list of maps, and keeps no name for what is not needed any more: at 2048 pixels
        each of these is a twentieth of the memory.
        """
        grid = make_levels([hw], x.device)
        stream, tokens = Stream(concatenate([to_tokens(m) for m in maps], dtype)), []
        maps.clear()
        for part, (first, last) in zip(self.interactions, self.interaction_indexes, strict=True):
            pending, stream, points = self._run(part.inject, x, stream, grid, pyramid)
            pending = self.trunk.run_stream(pending, hw, first, last + 1)
            x, feat = part.normalize(pending)
            del pending
            stream, x = self._run(part.extract, stream, x, feat, grid, pyramid, points)
            tokens = [*tokens, x] if self.token_maps == 'each' else [x]
        return stream, tokens

    def _cast_ahead(self, x: Tensor) -> AbstractContextManager[None]:
        """In training on a GPU: the casts that autocast would make one by one."""
        dtype = working_dtype(x)
        if form(x) != 'eager' or not torch.is_grad_enabled() or dtype == self.level_embed.dtype:
            return nullcontext()
        products = [p for interaction in self.interactions for p in interaction.products()]
        return cast_ahead(products, dtype)

    def _run(self, function: Callable[..., Any], *args: Tensor | Stream | Levels) -> Any:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def init_weights(self) -> None:
        """Loads the checkpoint that `init_cfg` names, if it names one; else the trunk's."""
        if not init_pretrained(self):
            super().init_weights()

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer of a parameter for layer-wise learning-rate decay, and the number of layers.

        The trunk's parameters have the trunk's layers; the adapter's own learn at the full rate.
        """
        trunk_prefix = f'{prefix}trunk.'
        _, num_layers = self.trunk.get_layer_depth(param_name, trunk_prefix)
        if param_name.startswith(trunk_prefix):
            return self.trunk.get_layer_depth(param_name, trunk_prefix)
        return num_layers - 1, num_layers

    def _reset_parameters(self) -> None:
        for interaction in self.interactions:
            for name, module in interaction.named_modules():
                if isinstance(module, nn.Conv2d):
                    init_conv(module)
                elif isinstance(module, nn.Linear) and '.ffn.' in f'.{name}':
                    trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        if self.up is not None:
            init_conv(self.up)


def _cast_finest(
    dtype: torch.dtype, up: Tensor, fc1: Tensor, up_bias: Tensor, fc1_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_finest` multiplies with, (4 C, C) and (C, channels of the stem), and both biases."""
    product = up.permute(2, 3, 1, 0).flatten(0, 2)  # rows in the order of pixels, then channels
    return product.to(dtype), fc1.flatten(1).to(dtype), up_bias + fc1_bias


def _check_trunk(trunk: dict) -> dict:
    if not isinstance(trunk, dict):
        raise ValueError(
            f"trunk must be a config such as dict(type='ViG', arch='tiny'), got {trunk!r}"
        )
    if trunk.get('final_norm'):
        raise ValueError('the adapter does not use the final norm of its trunk: leave it out')
    kind = trunk.get('type')
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if isinstance(kind, type) and not hasattr(kind, 'run_stream'):
        raise ValueError(
            f'{kind.__name__} is no plain trunk: the adapter wraps ViG or TimmViT; a backbone of '
            'several resolutions, such as ViGH, needs no adapter'
        )
    return trunk


def _check_interactions(
    indexes: tuple[tuple[int, int], ...], depth: int
) -> tuple[tuple[int, int], ...]:
    blocks = [i for first, last in indexes for i in range(first, last + 1)]
    if blocks != list(range(depth)):
        raise ValueError(
            f'interaction_indexes {indexes} must cover the {depth} blocks of the trunk once each, '
            'in order, such as ((0, 2), (3, 5), (6, 8), (9, 11))'
        )
    return tuple(tuple(pair) for pair in indexes)


def _check_token_maps(token_maps: str, num_interactions: int) -> str:
    if token_maps not in ('last', 'each'):
        raise ValueError(f"token_maps must be 'last' or 'each', got {token_maps!r}")
    if token_maps == 'each' and num_interactions != len(STRIDES):
        raise ValueError(f"token_maps='each' needs 4 interactions, got {num_interactions}")
    return token_maps
