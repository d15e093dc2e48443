"""Multi-scale deformable attention as the adapter uses it: fixed grid of reference points.

Shape legend: B batch, Q queries, S value tokens of L levels, C channels, H heads, P points.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from mmvig.kernels import ms_deform_attn, sampling_points
from mmvig.models.layers.kept import is_capturing
from mmvig.models.layers.linear import Linear, Product, keep_joined, merged_linear

# lists of sizes whose tables are kept; the largest of them are 8 bytes a token
MAX_LEVELS = 64


class Levels:
    """Sizes of a list of maps whose tokens are concatenated, and what attention needs to know.

    Made by `make_levels`, once per list of sizes. All tensors lie on one device and are filled
    there, without a copy from the host that would wait for the device.

    Args:
        shapes: (height, width) of each level.
        device: Device of the tensors.

    Attributes:
        sizes: Tokens of each level.
        spatial_shapes: (L, 2) int64, (height, width).
        start_index: (L,) int64, first token of each level.
        pixel: (L, 2) float32, (width, height) of a level's pixel, as shares of the map's.
        centers: (S, 2) float32, the centre (x, y) of every token's pixel, 0 to 1 across
            its map.
    """

    def __init__(self, shapes: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.shapes = shapes
        self.sizes = [h * w for h, w in shapes]
        starts = [sum(self.sizes[:i]) for i in range(len(shapes))]

        def filled(values: list[int], dtype: torch.dtype) -> Tensor:
            return torch.stack([torch.full((), v, dtype=dtype, device=device) for v in values])

        sides = [side for shape in shapes for side in shape]
        self.spatial_shapes = filled(sides, torch.long).unflatten(0, (-1, 2))
        self.start_index = filled(starts, torch.long)
        self.pixel = 1 / self.spatial_shapes.float().flip(-1)
        grids = [_pixel_centers(h, w, device) for h, w in shapes]
        self.centers = torch.cat(grids)


def _pixel_centers(h: int, w: int, device: torch.device) -> Tensor:
    """(h * w, 2), float32, (x, y) of a map's pixels, 0 to 1 across it."""
    y = (torch.arange(h, device=device) + 0.5) / h
    x = (torch.arange(w, device=device) + 0.5) / w
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1)


_LEVELS: OrderedDict[tuple, Levels] = OrderedDict()


def make_levels(shapes: list[tuple[int, int]], device: torch.device) -> Levels:
    """`Levels`, from a cache of the last sizes; in a compiled graph they are part of it."""
    key = (tuple(shapes), device)
    if torch.compiler.is_compiling():
        return Levels(*key)
    if key not in _LEVELS:
        with torch.inference_mode(False):  # training, too, may use what inference has made
            levels = Levels(*key)
        if type(levels.centers) is not Tensor or is_capturing(device):
            return levels  # tensors without values, or in the memory of a CUDA graph
        _LEVELS[key] = levels
        while len(_LEVELS) > MAX_LEVELS:
            _LEVELS.popitem(last=False)
    _LEVELS.move_to_end(key)
    return _LEVELS[key]


def cached_levels() -> list[Levels]:
    """All that are cached: a CUDA graph that reads them has to keep them."""
    return list(_LEVELS.values())


# Offsets (B, Q, H * L * P * 2) in pixels of the level, and logits (B, Q, H * L * P)
Points = tuple[Tensor, Tensor]


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (arXiv 2010.04159) without dropout and residual.

    Parameter names as in Deformable DETR's and ViT-Adapter's releases.

    Args:
        embed_dims: C, channels of queries and features.
        num_heads: H.
        num_levels: L.
        num_points: P, samples a query takes from each level.
        value_ratio: Channels of all heads together, as a share of C.

    Raises:
        ValueError: If the heads do not divide the value channels.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_levels: int,
        num_points: int = 4,
        value_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        value_dims = int(embed_dims * value_ratio)
        if value_dims % num_heads:
            raise ValueError(
                f'embed_dims * value_ratio ({value_dims}) must be divisible by num_heads '
                f'({num_heads})'
            )
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        num_samples = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(embed_dims, 2 * num_samples)
        self.attention_weights = Linear(embed_dims, num_samples)
        self.value_proj = Linear(embed_dims, value_dims)
        self.output_proj = Linear(value_dims, embed_dims)
        self._kept_points = keep_joined(2)
        self._reset_parameters()

    def forward(self, query: Tensor, feat: Tensor, grid: Levels, levels: Levels) -> Tensor:
        """Samples features around each query's reference point, the centre of its pixel.

        Args:
            query: (B, Q, C), tokens of `grid`.
            feat: (B, S, C), tokens of `levels`.
            grid: The levels of the queries.
            levels: The L levels of `feat`.

        Returns:
            (B, Q, C).
        """
        return self.output_proj(self.sample(query, feat, grid, levels))

    def sample(self, query: Tensor, feat: Tensor, grid: Levels, levels: Levels) -> Tensor:
        """The same, without the last projection: (B, Q, channels of all heads together)."""
        return self.sample_at(self.value_proj(feat), self.points(query), grid, levels)

    def points(self, query: Tensor) -> Points:
        """Of queries (B, Q, C)."""
        kept, weights, biases = self.products()
        return tuple(merged_linear(query, weights, biases, kept))

    def sample_at(self, value: Tensor, points: Points, grid: Levels, levels: Levels) -> Tensor:
        """As `sample`, of what the projection of the features and `points` gave."""
        value = value.unflatten(-1, (self.num_heads, -1))
        heads = (self.num_heads, self.num_levels, self.num_points)
        maps, table = (levels.spatial_shapes, levels.start_index), (grid.centers, levels.pixel)
        return ms_deform_attn(value, *maps, *sampling_points(*points, table, heads))

    def products(self) -> Product:
        """Of the linears that are called as one, for `cast_ahead`."""
        linears = (self.sampling_offsets, self.attention_weights)
        return self._kept_points, [x.weight for x in linears], [x.bias for x in linears]

    def _reset_parameters(self) -> None:
        """Heads look in evenly spread directions, point i at distance i + 1; equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)
        bias = directions[:, None, None] * distances[:, None]
        bias = bias.expand(-1, self.num_levels, -1, -1)
        self.sampling_offsets.bias.data.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
