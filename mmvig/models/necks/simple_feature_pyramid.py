"""ViTDet's simple feature pyramid: several strides from the one map of a plain trunk."""

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

EPS = 1e-6
NUM_SCALES = 4


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps of strides 4, 8, 16, 32 … of the last map of a trunk of stride 16.

    The map is enlarged by transposed convs or shrunk by pooling, each scale for itself; a 1x1 and a
    3x3 conv with LayerNorm follow. Source: ViTDet (arXiv 2203.16527), section 3; layers as in
    detectron2's release. Lighter than `ViTAdapter`, and a `neck=` for any plain trunk, since it
    needs neither the image nor the blocks.

    Args:
        in_channels: C, channels of the trunk; a multiple of 4.
        out_channels: Channels of the outputs.
        num_outs: Outputs; those beyond four take every second pixel of the one before.
        init_cfg: As of every `BaseModule`.

    Raises:
        ValueError: If channels are no multiple of 4, or there are fewer than four outputs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if in_channels % 4:
            raise ValueError(f'in_channels ({in_channels}) must be a multiple of 4')
        if num_outs < NUM_SCALES:
            raise ValueError(f'num_outs ({num_outs}) must be at least {NUM_SCALES}')
        self.num_outs = num_outs
        c = in_channels
        self.scales = nn.ModuleList(
            [
                _scale(
                    [_double(c, c // 2), LayerNorm2d(c // 2, eps=EPS), nn.GELU()]
                    + [_double(c // 2, c // 4)],
                    c // 4,
                    out_channels,
                ),
                _scale([_double(c, c // 2)], c // 2, out_channels),
                _scale([], c, out_channels),
                _scale([nn.MaxPool2d(2, 2, ceil_mode=True)], c, out_channels),
            ]
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The trunk's maps, the last of which (B, C, h, w) is used, to `num_outs` maps.

        Output i is (B, out_channels, h * 4 / 2^i, w * 4 / 2^i), sides rounded up.
        """
        outs = [scale(inputs[-1]) for scale in self.scales]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)


def _double(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)


def _scale(resize: list[nn.Module], in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *resize,
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels, eps=EPS),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels, eps=EPS),
    )
