"""Spatial prior module of the ViT-Adapter: a small convolutional pyramid beside the trunk."""

import math

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from mmvig.kernels.dispatch import form
from mmvig.models.layers.linear import merged_linear


class SpatialPriorModule(nn.Module):
    """Image to maps of strides 4, 8, 16 and 32.

    Source: ViT-Adapter (arXiv 2205.08534), section 3.3; parameter names as in its release.

    Args:
        in_channels: Channels of the image.
        embed_dims: C, channels of the four maps.
        channels: Channels of the stem; the deeper convs have 2, 4 and 4 times as many.
        norm_cfg: Batch norm of the convs.
        with_finest: Whether the map of stride 4 is wanted.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        channels: int,
        norm_cfg: dict,
        with_finest: bool = True,
    ) -> None:
        super().__init__()

        def conv(cin: int, cout: int, stride: int = 2) -> list[nn.Module]:
            return [
                nn.Conv2d(cin, cout, 3, stride=stride, padding=1, bias=False),
                build_norm_layer(norm_cfg, cout)[1],
                nn.ReLU(inplace=True),
            ]

        c = channels
        self.stem = nn.Sequential(
            *conv(in_channels, c),
            *conv(c, c, stride=1),
            *conv(c, c, stride=1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*conv(c, 2 * c))
        self.conv3 = nn.Sequential(*conv(2 * c, 4 * c))
        self.conv4 = nn.Sequential(*conv(4 * c, 4 * c))
        self.fc1 = nn.Conv2d(c, embed_dims, 1) if with_finest else None
        self.fc2 = nn.Conv2d(2 * c, embed_dims, 1)
        self.fc3 = nn.Conv2d(4 * c, embed_dims, 1)
        self.fc4 = nn.Conv2d(4 * c, embed_dims, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """(B, in_channels, H, W), sides multiples of 32, to (B, C, H / s, W / s), s = 4 … 32."""
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        finest = None if self.fc1 is None else project(self.fc1, c1)
        return finest, project(self.fc2, c2), project(self.fc3, c3), project(self.fc4, c4)


def project(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 conv of (B, C, H, W): on a GPU, and compiled, as a product with the bias in it."""
    if form(x) != 'eager' and not torch.compiler.is_compiling():
        return conv(x)
    (out,) = merged_linear(x.permute(0, 2, 3, 1), [conv.weight.flatten(1)], [conv.bias])
    return out.permute(0, 3, 1, 2)


def init_conv(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Normal weights of variance 2 / fan-out, zero bias."""
    fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
