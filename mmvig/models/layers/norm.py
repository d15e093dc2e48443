"""Norms over channels, also of the sum of a residual stream and a branch; batch norm."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvig.kernels import batch_norm, residual_norm
from mmvig.models.layers.hooks import has_hooks


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


def draw_keep(x: Tensor, drop_path: DropPath, branches: int) -> Sequence[Tensor | None]:
    """For each branch (B,): the factors of samples that drop path draws; None where all are 1."""
    if not drop_path.training or drop_path.drop_prob == 0.0:
        return [None] * branches
    keep = 1 - drop_path.drop_prob
    factors = x.new_empty(branches, x.shape[0], dtype=torch.float32).bernoulli_(keep)
    scales = keep > 0 and drop_path.scale_by_keep
    return (factors.div_(keep) if scales else factors).unbind()


def add(x: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    """`x + keep * y`, with or without factors (B,)."""
    if keep is not None:
        y = y * keep.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
    return x + y


class Stream(NamedTuple):
    """A residual stream whose last branch is still to be added: the next norm does it in one pass.

    Attributes:
        x: (B, N, C).
        y: (B, N, C), to be added to it; or None.
        keep: (B,), factors of y, which drop path has drawn; or None.
    """

    x: Tensor
    y: Tensor | None = None
    keep: Tensor | None = None

    def sum(self, dtype: torch.dtype | None = None) -> Tensor:
        """(B, N, C), with everything added; in the wider dtype of x and y where none is given."""
        if self.y is None:
            return self.x if dtype is None else self.x.to(dtype)
        if dtype is None or torch.compiler.is_compiling():
            total = add(*self)
            return total if dtype is None else total.to(dtype)
        y = self.y if self.keep is None else self.y * self.keep.to(self.y.dtype)[:, None, None]
        return _RoundedSum.apply(self.x, y, dtype)


class _RoundedSum(torch.autograd.Function):
    """x + y, rounded to a dtype in the same pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, y: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.dtypes = (x.dtype, y.dtype)
        return torch.add(x, y, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        x_dtype, y_dtype = ctx.dtypes
        return grad.to(x_dtype), grad.to(y_dtype), None


def normalize_batch(norm: nn.Module, x: Tensor, relu: bool = False, pool: bool = False) -> Tensor:
    """Batch norm by a layer; on request ReLU and 3x3 max pooling with stride 2 in the same pass.

    Layers of other kinds, and statistics over several processes, take their own way.
    """
    if not _is_batch_norm(norm) or (norm.training and synchronizes(norm)):
        x = norm(x)
        x = F.relu(x, inplace=True) if relu else x
        return F.max_pool2d(x, 3, stride=2, padding=1) if pool else x
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return batch_norm(
        x,
        (norm.running_mean, norm.running_var),
        norm.weight,
        norm.bias,
        norm.training,
        norm.momentum,
        norm.eps,
        relu,
        pool,
    )


def given_statistics(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Mean, variance, weight and bias of a batch norm in evaluation mode; None for any other."""
    if norm.training or not _is_batch_norm(norm):
        return None
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def _is_batch_norm(norm: nn.Module) -> bool:
    """Whether a layer is batch norm with all that it can have, and nobody looks at its calls."""
    if not isinstance(norm, _BatchNorm) or has_hooks(norm):
        return False
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def synchronizes(norm: nn.Module) -> bool:
    """Whether a layer is batch norm whose statistics in training are of several processes."""
    if not isinstance(norm, nn.SyncBatchNorm):
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
