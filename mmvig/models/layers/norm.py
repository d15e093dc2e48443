"""RMSNorm and LayerNorm over channels, also of the sum of a residual stream and a branch."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mmvig.kernels import residual_norm


class _Addable:
    """What both norms share; the one difference is the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same; under autocast in its dtype, which the next layer wants."""
        return residual_norm(x, None, self.weight, self.bias, self.eps)[1]

    def add(self, x: Tensor, y: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """`s = x + keep * y` and the norm of s, in one pass.

        Args:
            x: (B, ..., C), the residual stream.
            y: (B, ..., C), what a branch adds; or None.
            keep: (B,), factors of y, as `draw_keep` draws them; or None.

        Returns:
            s and its norm.
        """
        return residual_norm(x, y, self.weight, self.bias, self.eps, keep)


class RMSNorm(_Addable, nn.RMSNorm):
    """`nn.RMSNorm` over the last dim, with `add`."""

    bias = None


class LayerNorm(_Addable, nn.LayerNorm):
    """`nn.LayerNorm` over the last dim, with `add`."""


def draw_keep(x: Tensor, drop_path: DropPath) -> Tensor | None:
    """(B,): the factor of each sample that drop path draws; None where all are 1."""
    if not drop_path.training or drop_path.drop_prob == 0.0:
        return None
    keep = 1 - drop_path.drop_prob
    factors = x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(keep)
    return factors.div_(keep) if keep > 0 and drop_path.scale_by_keep else factors


def add(x: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    """`x + keep * y`, with or without factors (B,)."""
    if keep is not None:
        y = y * keep.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
    return x + y
