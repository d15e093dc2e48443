"""Spatial prior module of the ViT-Adapter: a small convolutional pyramid beside the trunk."""

import math
from collections.abc import Sequence

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from mmvig.kernels import stem_conv
from mmvig.kernels.stem_conv import MAX_CHANNELS
from mmvig.models.layers.conv import Conv2d, PointConv2d
from mmvig.models.layers.hooks import has_hooks
from mmvig.models.layers.norm import given_statistics, normalize_batch


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
                Conv2d(cin, cout, 3, stride, padding=1, bias=False),
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
        self.fc1 = PointConv2d(c, embed_dims) if with_finest else None
        self.fc2 = PointConv2d(2 * c, embed_dims)
        self.fc3 = PointConv2d(4 * c, embed_dims)
        self.fc4 = PointConv2d(4 * c, embed_dims)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)

    def forward(
        self,
        x: Tensor,
        shifts: Sequence[Tensor | None] = (None, None, None),
        project_finest: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """(B, in_channels, H, W), sides multiples of 32, to (B, C, H / s, W / s), s = 4 … 32.

        Shifts (C,) are added to the pixels of the last three maps. The first map may be left as it
        is before `fc1`, with the stem's channels.
        """
        c1 = _run(self.stem, x)
        c2 = _run(self.conv2, c1)
        c3 = _run(self.conv3, c2)
        c4 = _run(self.conv4, c3)
        finest = None if self.fc1 is None else self.fc1(c1) if project_finest else c1
        coarse = zip((self.fc2, self.fc3, self.fc4), (c2, c3, c4), shifts, strict=True)
        return finest, *(fc(m, shift) for fc, m, shift in coarse)


def _run(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Triples of conv, norm and ReLU; where they are followed by pooling, the last with that."""
    pools = len(layers) % 3 == 1
    triples = len(layers) // 3
    for i in range(triples):
        conv, norm = layers[3 * i], layers[3 * i + 1]
        pool, bare = pools and i == triples - 1, not _is_watched(conv)
        begins = bare and conv.stride == (2, 2) and conv.in_channels <= MAX_CHANNELS
        given = None if pool or torch.is_grad_enabled() else given_statistics(norm)
        if begins and given is not None:
            x = stem_conv(x, conv.weight, given, norm.eps, relu=True)
        elif bare and given is not None and conv.folds_norm(x):
            x = conv.with_norm(x, norm)
        else:
            x = stem_conv(x, conv.weight) if begins else conv(x)
            x = normalize_batch(norm, x, relu=True, pool=pool)
    return x


def _is_watched(conv: nn.Module) -> bool:
    """Whether the module has to run: hooks want to see it, or nothing but it would."""
    return type(conv) is not Conv2d or has_hooks(conv)


def init_conv(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Normal weights of variance 2 / fan-out, zero bias."""
    fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
