"""Multi-scale deformable attention as the adapter uses it: fixed grid of reference points.

Shape legend: B batch, Q queries, S value tokens of L levels, C channels, H heads, P points.
"""

import math

import torch
from torch import Tensor, nn

from mmvig.kernels import ms_deform_attn


class Levels:
    """Sizes of a list of maps whose tokens are concatenated, and their pixel centres.

    Args:
        shapes: (height, width) of each level.
        device: Device of the tensors.
    """

    def __init__(self, shapes: list[tuple[int, int]], device: torch.device) -> None:
        self.shapes = shapes
        self.sizes = [h * w for h, w in shapes]
        starts = [sum(self.sizes[:i]) for i in range(len(shapes))]
        self.spatial_shapes = torch.tensor(shapes, dtype=torch.long, device=device)
        self.start_index = torch.tensor(starts, dtype=torch.long, device=device)

    def centers(self) -> Tensor:
        """(S, 2): the centre (x, y) of every token's pixel, 0 to 1 across its map."""
        device = self.spatial_shapes.device
        grids = []
        for h, w in self.shapes:
            y = (torch.arange(h, device=device) + 0.5) / h
            x = (torch.arange(w, device=device) + 0.5) / w
            grids.append(torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], -1).flatten(0, 1))
        return torch.cat(grids)


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
        self.sampling_offsets = nn.Linear(embed_dims, 2 * num_samples)
        self.attention_weights = nn.Linear(embed_dims, num_samples)
        self.value_proj = nn.Linear(embed_dims, value_dims)
        self.output_proj = nn.Linear(value_dims, embed_dims)
        self._reset_parameters()

    def forward(self, query: Tensor, points: Tensor, feat: Tensor, levels: Levels) -> Tensor:
        """Samples features around each query's reference point.

        Args:
            query: (B, Q, C).
            points: (Q, 2), the queries' reference points, (x, y), 0 to 1 across every level.
            feat: (B, S, C), tokens of `levels`.
            levels: The L levels of `feat`.

        Returns:
            (B, Q, C).
        """
        heads = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(feat).unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).float().unflatten(-1, (*heads, 2))
        # offsets are in pixels of their level
        locations = points[:, None, None, None] + offsets / levels.spatial_shapes.flip(-1)[:, None]
        logits = self.attention_weights(query).float()
        weights = logits.unflatten(-1, (self.num_heads, -1)).softmax(-1).unflatten(-1, heads[1:])
        return self.output_proj(
            ms_deform_attn(value, levels.spatial_shapes, levels.start_index, locations, weights)
        )

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
