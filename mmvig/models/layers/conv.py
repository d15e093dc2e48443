"""Convolutions whose weights are cast, and laid out as cuDNN wants them, once in inference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvig.kernels import patch_conv
from mmvig.kernels.dispatch import HALVES, form, working_dtype
from mmvig.kernels.patch_conv import as_matrix, has_kernel, windows
from mmvig.models.layers.kept import Kept, cast
from mmvig.models.layers.linear import merged_linear, multiply
from mmvig.models.layers.norm import given_statistics


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` without groups, with zeros around the map.

    On a GPU, outside `torch.compile`, one call casts the weights and lays them out channels last,
    in inference only when they have changed.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
        padding: int = 0, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self._kept, self._kept_folded = Kept(cast), Kept(fold_norm)

    def with_norm(self, x: Tensor, norm: _BatchNorm) -> Tensor:
        """The conv, batch norm in evaluation mode and ReLU, by one call; see `folds_norm`."""
        # the number of batches, since PyTorch does not count changes of running means as such
        changes = (norm.num_batches_tracked, *given_statistics(norm))
        params = self._kept_folded((x.dtype, norm.eps), self.weight, *changes)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return torch.cudnn_convolution_relu(x, *params, *settings)

    def folds_norm(self, x: Tensor) -> bool:
        """Whether `with_norm` serves: in inference on a GPU with cuDNN, in half precision."""
        half = x.dtype in HALVES
        if torch.is_grad_enabled() or not (half and x.is_cuda) or self.bias is not None:
            return False
        return form(x) == 'eager' and torch.version.hip is None and torch.backends.cudnn.enabled

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W')."""
        if form(x) != 'eager':
            return super().forward(x)
        params = [self.weight] if self.bias is None else [self.weight, self.bias]
        dtype = working_dtype(x)
        if torch.is_grad_enabled():
            params[0] = self.weight.to(dtype=dtype, memory_format=torch.channels_last)
        else:
            params = self._kept(dtype, *params)
        bias = params[1] if self.bias is not None else None
        return F.conv2d(x, params[0], bias, self.stride, self.padding)


def fold_norm(
    setting: tuple[torch.dtype, float],
    weight: Tensor,
    num_batches: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weight, channels last, and bias, in a dtype, of a conv with a batch norm behind it.

    Setting is the dtype and the norm's eps; the number of batches is not used.
    """
    dtype, eps = setting
    factor = scale * torch.rsqrt(var + eps)
    folded = (weight * factor[:, None, None, None]).to(dtype, memory_format=torch.channels_last)
    return folded, (shift - mean * factor).to(dtype)


class PatchConv2d(Conv2d):
    """A conv of few channels and large windows, by `patch_conv`; in inference with kept weights."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self._kept_matrix = Kept(_cast_matrix)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W')."""
        if not has_kernel(x):
            return super().forward(x)
        settings = (self.stride[0], self.padding[0])
        if torch.is_grad_enabled():
            return patch_conv(x, self.weight, self.bias, *settings)
        made = self._kept_matrix(x.dtype, self.weight, self.bias)
        return multiply(windows(x, self.kernel_size, *settings), *made).permute(0, 3, 1, 2)


def _cast_matrix(dtype: torch.dtype, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return as_matrix(weight, dtype), bias.to(dtype)


class PointConv2d(nn.Conv2d):
    """A 1x1 conv: on a GPU, and compiled, a product with the bias in it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        self._kept = Kept(_cast_product)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W); shift (out_channels,) is added."""
        if form(x) != 'eager' and not torch.compiler.is_compiling():
            out = super().forward(x)
            return out if shift is None else out + shift[:, None, None]
        pixels, weight = x.permute(0, 2, 3, 1), self.weight.flatten(1)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            bias = self.bias if shift is None else self.bias + shift
            (out,) = merged_linear(pixels, [weight], [bias])
        else:
            biases = (self.bias,) if shift is None else (self.bias, shift)
            out = multiply(pixels, *self._kept(working_dtype(x), weight, *biases))
        return out.permute(0, 3, 1, 2)


def _cast_product(dtype: torch.dtype, weight: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the sum of the biases in a dtype."""
    return weight.to(dtype), sum(biases[1:], biases[0]).to(dtype)
