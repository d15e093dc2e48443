"""Injectors and extractors of the ViT-Adapter: how trunk and pyramid tell each other.

Shape legend: B batch, C channels, N tokens of the trunk's grid, S tokens of the pyramid's levels.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mmvig.kernels.dispatch import form, working_dtype
from mmvig.models.layers.deform_attn import DeformableAttention, Levels
from mmvig.models.layers.ffn import ConvFFN
from mmvig.models.layers.hooks import has_hooks
from mmvig.models.layers.kept import Kept
from mmvig.models.layers.linear import Linear, Product, merged_linear, multiply
from mmvig.models.layers.norm import LayerNorm, Stream, draw_keep

EPS = 1e-6


class Injector(nn.Module):
    """Tokens take from the pyramid: `x + gamma * attn(norm(x), norm(c))`; gamma starts at 0."""

    def __init__(self, dims: int, num_heads: int, num_points: int, value_ratio: float) -> None:
        super().__init__()
        self.query_norm = LayerNorm(dims, eps=EPS)
        self.feat_norm = LayerNorm(dims, eps=EPS)
        self.attn = DeformableAttention(dims, num_heads, 3, num_points, value_ratio)
        self.gamma = nn.Parameter(torch.zeros(dims))
        self._kept = Kept(_cast_scaled)

    def forward(self, x: Tensor, c: Stream, grid: Levels, pyramid: Levels) -> tuple[Stream, Stream]:
        """x (B, N, C) of the grid, c (B, S, C) of the pyramid's three levels, to new x, and c."""
        total, feat = self.feat_norm.add(*c)
        x, query = self.query_norm.add(x, None, None)
        proj = self.attn.output_proj
        if form(x) != 'eager' or _is_watched(self.attn) or _is_watched(proj):
            return Stream(x, self.gamma * self.attn(query, feat, grid, pyramid)), Stream(total)
        # gamma times a product is the product with gamma times the weights
        sampled = self.attn.sample(query, feat, grid, pyramid)
        if torch.is_grad_enabled():
            weight, bias = _scale(proj.weight, proj.bias, self.gamma)
            (out,) = merged_linear(sampled, [weight], [bias])
        else:
            made = self._kept(working_dtype(x), proj.weight, proj.bias, self.gamma)
            out = multiply(sampled, *made)
        return Stream(x, out), Stream(total)


def _scale(weight: Tensor, bias: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return gamma[:, None] * weight, gamma * bias


def _cast_scaled(dtype: torch.dtype, *params: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) for x in _scale(*params))


def _is_watched(module: nn.Module) -> bool:
    """Whether a module's call is seen by hooks, or is not that of this project."""
    kinds = (DeformableAttention, Linear)
    return type(module) not in kinds or has_hooks(module)


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

    def forward(self, c: Stream, x: Stream, grid: Levels, pyramid: Levels) -> tuple[Stream, Stream]:
        """c (B, S, C) of the pyramid, x (B, N, C) of the grid, to new c, and x."""
        total, query = self.query_norm.add(*c)
        x, feat = self.feat_norm.add(*x)
        out = self.attn(query, feat, pyramid, grid)
        total, normed = self.ffn_norm.add(total, out, None)
        out = self.ffn(normed, pyramid.shapes)
        return Stream(total, out, draw_keep(total, self.drop_path)), Stream(x)


class Interaction(nn.Module):
    """Parts of one interaction: an injector before some blocks of the trunk, extractors after."""

    def __init__(self, injector: Injector, extractor: Extractor, extra: list[Extractor]) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractor
        self.extra_extractors = nn.ModuleList(extra) if extra else None

    def products(self) -> list[Product]:
        """All whose weights can be cast ahead: not the injector's last, which gamma scales."""
        scaled = self.injector.attn.output_proj
        parts = {m: None for m in self.modules() if isinstance(m, (DeformableAttention, Linear))}
        for attn in [m for m in parts if isinstance(m, DeformableAttention)]:
            for linear in (attn.sampling_offsets, attn.attention_weights):
                parts.pop(linear, None)
        return [m.products() for m in parts if m is not scaled]

    def extract(self, c: Stream, x: Stream, grid: Levels, pyramid: Levels) -> tuple[Stream, Tensor]:
        """Runs the extractors in turn; arguments as of `Extractor.forward`, x is returned added."""
        for extractor in (self.extractor, *(self.extra_extractors or ())):
            c, x = extractor(c, x, grid, pyramid)
        return c, x.sum()
