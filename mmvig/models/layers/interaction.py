"""Injectors and extractors of the ViT-Adapter: how trunk and pyramid tell each other.

Shape legend: B batch, C channels, N tokens of the trunk's grid, S tokens of the pyramid's levels.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mmvig.kernels import residual_norm
from mmvig.kernels.dispatch import form, working_dtype
from mmvig.models.layers.deform_attn import DeformableAttention, Levels, Points
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
        if form(x) != 'eager' or self.is_watched():
            query = self.query_norm(x)
            return Stream(x, self.gamma * self.attn(query, feat, grid, pyramid)), Stream(total)
        return self.inject(x, self.attn.value_proj(feat), grid, pyramid), Stream(total)

    def is_watched(self) -> bool:
        """Whether the attention or its last projection has to run as a module."""
        return _is_watched(self.attn) or _is_watched(self.attn.output_proj)

    def inject(self, x: Tensor, value: Tensor, grid: Levels, pyramid: Levels) -> Stream:
        """x with what it takes of the projected features; on a GPU."""
        x, query = self.query_norm.add(x, None, None)
        sampled = self.attn.sample_at(value, self.attn.points(query), grid, pyramid)
        # gamma times a product is the product with gamma times the weights
        proj = self.attn.output_proj
        if torch.is_grad_enabled():
            weight, bias = _scale(proj.weight, proj.bias, self.gamma)
            (out,) = merged_linear(sampled, [weight], [bias])
        else:
            made = self._kept(working_dtype(x), proj.weight, proj.bias, self.gamma)
            out = multiply(sampled, *made)
        return Stream(x, out)


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

    def forward(
        self,
        c: Stream,
        feat: Tensor,
        grid: Levels,
        pyramid: Levels,
        points: Points | None = None,
    ) -> Stream:
        """c (B, S, C) of the pyramid, what `feat_norm` makes of the grid's (B, N, C), to new c.

        Points are the attention's of c, where they are known; c has nothing to be added then.
        """
        if points is None:
            total, query = self.query_norm.add(*c)
            out = self.attn(query, feat, pyramid, grid)
        else:
            total, value = c.x, self.attn.value_proj(feat)
            out = self.attn.output_proj(self.attn.sample_at(value, points, pyramid, grid))
        total, normed = self.ffn_norm.add(total, out, None)
        out = self.ffn(normed, pyramid.shapes)
        return Stream(total, out, *draw_keep(total, self.drop_path, branches=1))


class Interaction(nn.Module):
    """Parts of one interaction: an injector before some blocks of the trunk, extractors after."""

    def __init__(self, injector: Injector, extractor: Extractor, extra: list[Extractor]) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractor
        self.extra_extractors = nn.ModuleList(extra) if extra else None
        self._kept = Kept(_fold_norms)

    def products(self) -> list[Product]:
        """All whose weights can be cast ahead: not the injector's last, which gamma scales."""
        scaled = self.injector.attn.output_proj
        parts = {m: None for m in self.modules() if isinstance(m, (DeformableAttention, Linear))}
        for attn in [m for m in parts if isinstance(m, DeformableAttention)]:
            for linear in (attn.sampling_offsets, attn.attention_weights):
                parts.pop(linear, None)
        return [m.products() for m in parts if m is not scaled]

    def inject(
        self, x: Tensor, c: Stream, grid: Levels, pyramid: Levels
    ) -> tuple[Stream, Stream, Points | None]:
        """Runs the injector; in inference on a GPU with the extractor's first product, too.

        Both read norms of c, which stays as it is in between: with the norms' weights in those of
        the products, one norm serves both. Returns new x, c, and the extractor's points, or None.
        """
        if not self._folds(x):
            return *self.injector(x, c, grid, pyramid), None
        first, second = self.injector, self.extractor
        linears = (
            first.attn.value_proj,
            second.attn.sampling_offsets,
            second.attn.attention_weights,
        )
        params = [p for part in (first.feat_norm, second.query_norm, *linears)
                  for p in (part.weight, part.bias)]  # fmt: skip
        *products, ones, zeros = self._kept(working_dtype(x), *params)
        total, normed = residual_norm(c.x, c.y, ones, zeros, EPS, c.keep)
        # two products, since the points outlive the value, which takes more memory
        value, points = multiply(normed, *products[:2]), multiply(normed, *products[2:])
        points = points.split([linear.out_features for linear in linears[1:]], -1)
        return first.inject(x, value, grid, pyramid), Stream(total), points

    def _folds(self, x: Tensor) -> bool:
        """Whether norms can go into products: in inference on a GPU, nobody looking on."""
        if torch.is_grad_enabled() or form(x) != 'eager':
            return False
        first, second = self.injector, self.extractor
        modules = (first.attn, second.attn, first.attn.value_proj, second.attn.sampling_offsets,
                   second.attn.attention_weights)  # fmt: skip
        norms = (first.feat_norm, second.query_norm)
        return not (
            first.is_watched()
            or any(_is_watched(m) for m in modules)
            or any(type(norm) is not LayerNorm for norm in norms)
            or any(has_hooks(m) for m in (first, second, *norms))
        )

    def extract(
        self,
        c: Stream,
        x: Tensor,
        feat: Tensor,
        grid: Levels,
        pyramid: Levels,
        points: Points | None = None,
    ) -> tuple[Stream, Tensor]:
        """Runs the extractors in turn; x (B, N, C) and feat are what `normalize` returned.

        Other arguments as of `Extractor.forward`; returns c and x.
        """
        c = self.extractor(c, feat, grid, pyramid, points)
        for extractor in self.extra_extractors or ():
            x, feat = extractor.feat_norm.add(x, None, None)
            c = extractor(c, feat, grid, pyramid)
        return c, x

    def normalize(self, x: Stream) -> tuple[Tensor, Tensor]:
        """The grid's tokens, added, and their norm for the first extractor."""
        return self.extractor.feat_norm.add(*x)


def _fold_norms(
    dtype: torch.dtype, feat: Tensor, feat_bias: Tensor, query: Tensor, query_bias: Tensor,
    *linears: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Weights and biases of linears with the norms before them in them; then ones and zeros.

    The first linear reads the norm of the features, the others, returned as one, of the queries.
    """
    value, value_bias, *others = linears
    points, points_bias = torch.cat(others[::2]), torch.cat(others[1::2])
    folded = (
        value * feat, value_bias + value @ feat_bias,
        points * query, points_bias + points @ query_bias,
    )  # fmt: skip
    return *(t.to(dtype) for t in folded), torch.ones_like(feat), torch.zeros_like(feat)
