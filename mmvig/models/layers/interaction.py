"""Injectors and extractors of the ViT-Adapter: how trunk and pyramid tell each other.

Shape legend: B batch, C channels, N tokens of the trunk's grid, S tokens of the pyramid's levels.
"""

from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mmvig.models.layers.deform_attn import DeformableAttention, Levels
from mmvig.models.layers.ffn import ConvFFN
from mmvig.models.layers.norm import LayerNorm, add, draw_keep

EPS = 1e-6


class Stream(NamedTuple):
    """A residual stream whose last branch is still to be added: the next norm does it in one pass.

    Attributes:
        x: (B, S, C).
        y: (B, S, C), to be added to it; or None.
        keep: (B,), factors of y, which drop path has drawn; or None.
    """

    x: Tensor
    y: Tensor | None = None
    keep: Tensor | None = None

    def sum(self) -> Tensor:
        """(B, S, C), with everything added."""
        return self.x if self.y is None else add(*self)


class Injector(nn.Module):
    """Tokens take from the pyramid: `x + gamma * attn(norm(x), norm(c))`; gamma starts at 0."""

    def __init__(self, dims: int, num_heads: int, num_points: int, value_ratio: float) -> None:
        super().__init__()
        self.query_norm = LayerNorm(dims, eps=EPS)
        self.feat_norm = LayerNorm(dims, eps=EPS)
        self.attn = DeformableAttention(dims, num_heads, 3, num_points, value_ratio)
        self.gamma = nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor, c: Stream, grid: Levels, pyramid: Levels) -> tuple[Tensor, Stream]:
        """x (B, N, C) of the grid, c (B, S, C) of the pyramid's three levels, to new x, and c."""
        total, feat = self.feat_norm.add(*c)
        out = self.attn(self.query_norm(x), feat, grid, pyramid)
        return x + self.gamma * out, Stream(total)


class Extractor(nn.Module):
    """The pyramid takes from the tokens, then a feed-forward network with a depthwise conv."""

    def __init__(
        self,
        dims: int,
        num_heads: int,
        num_points: int,
        value_ratio: float,
        ffn_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.query_norm = LayerNorm(dims, eps=EPS)
        self.feat_norm = LayerNorm(dims, eps=EPS)
        self.attn = DeformableAttention(dims, num_heads, 1, num_points, value_ratio)
        self.ffn = ConvFFN(dims, int(dims * ffn_ratio))
        self.ffn_norm = LayerNorm(dims, eps=EPS)
        self.drop_path = DropPath(drop_path)

    def forward(self, c: Stream, x: Tensor, grid: Levels, pyramid: Levels) -> Stream:
        """c (B, S, C) of the pyramid, x (B, N, C) of the grid, to new c."""
        total, query = self.query_norm.add(*c)
        out = self.attn(query, self.feat_norm(x), pyramid, grid)
        total, normed = self.ffn_norm.add(total, out, None)
        return Stream(total, self.ffn(normed, pyramid.shapes), draw_keep(total, self.drop_path))


class Interaction(nn.Module):
    """Parts of one interaction: an injector before some blocks of the trunk, extractors after."""

    def __init__(self, injector: Injector, extractor: Extractor, extra: list[Extractor]) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractor
        self.extra_extractors = nn.ModuleList(extra) if extra else None

    def extract(self, c: Stream, x: Tensor, grid: Levels, pyramid: Levels) -> Stream:
        """Runs the extractors in turn; arguments as of `Extractor.forward`."""
        for extractor in (self.extractor, *(self.extra_extractors or ())):
            c = extractor(c, x, grid, pyramid)
        return c
