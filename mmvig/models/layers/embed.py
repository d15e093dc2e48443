"""From images to tokens: patch embedding, position embedding, and the two layouts of a map.

Shape legend: B batch, C channels, (h, w) token grid, N = h * w tokens, (H, W) image.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mmvig.kernels import channels_last, residual_norm
from mmvig.kernels.dispatch import working_dtype
from mmvig.models.layers.conv import Conv2d, PatchConv2d
from mmvig.models.layers.kept import Kept, is_capturing


def to_map(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """(B, N, C) tokens to a (B, C, h, w) view, channels last in memory."""
    return x.unflatten(1, hw).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, N, C), row-major; a view where the map is channels last in memory."""
    return x.flatten(2).transpose(1, 2)


def concatenate(tokens: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Tokens (B, N_i, C) one after another, (B, sum of N_i, C), cast to a wider dtype."""
    if torch.compiler.is_compiling() or all(t.dtype == dtype for t in tokens):
        return torch.cat(list(tokens), 1).to(dtype)
    return _Concatenated.apply(dtype, *tokens)


class _Concatenated(torch.autograd.Function):
    """Each part is read and written once, where `cat` would do so after the casts."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, dtype: torch.dtype, *tokens: Tensor
    ) -> Tensor:
        ctx.dtypes, ctx.sizes = [t.dtype for t in tokens], [t.shape[1] for t in tokens]
        first = tokens[0]
        out = first.new_empty(first.shape[0], sum(ctx.sizes), first.shape[2], dtype=dtype)
        for part, t in zip(out.split(ctx.sizes, 1), tokens, strict=True):
            part.copy_(t)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        parts = zip(grad.split(ctx.sizes, 1), ctx.dtypes, strict=True)
        return None, *(part.to(dtype) for part, dtype in parts)


def check_image(x: Tensor, in_channels: int, patch_size: int) -> None:
    """Raises ValueError where (B, C, H, W) has other channels, a short side, or integers."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f'expected an image batch (B, {in_channels}, H, W), got {tuple(x.shape)}: '
            'set in_channels, or convert the images'
        )
    if not x.is_floating_point():
        raise ValueError(
            f'expected images in a floating dtype, got {x.dtype}: normalize them, as the data '
            'preprocessor does'
        )
    if min(x.shape[2:]) < patch_size:
        raise ValueError(
            f'image of {x.shape[2]}x{x.shape[3]} pixels is smaller than one patch '
            f'({patch_size}x{patch_size}): resize or pad it'
        )


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pads (B, C, H, W) with zeros, right and bottom, to multiples of `multiple` pixels."""
    pad_h, pad_w = -x.shape[2] % multiple, -x.shape[3] % multiple
    return F.pad(x, (0, pad_w, 0, pad_h)) if pad_h or pad_w else x


def to_conv_input(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The image (B, C, H, W) as convs on a GPU want it: channels last, and cast if autocast would.

    Casting once serves every conv that reads it, and what convs make of a channels-last map are
    tokens without a copy. What is so already stays as it is; if out is given it is written there.
    """
    return channels_last(x, working_dtype(x), out)


class MapNorm(LayerNorm2d):
    """LayerNorm over the channels of (B, C, H, W) maps that are channels last in memory.

    Args:
        num_channels: C.
        eps: Added to the variance.
        wide: Whether the result is float32 at least; else, under autocast, of its dtype.
    """

    def __init__(self, num_channels: int, eps: float, wide: bool = False) -> None:
        super().__init__(num_channels, eps=eps)
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        dtype = torch.promote_types(x.dtype, torch.float32) if self.wide else None
        tokens = x.permute(0, 2, 3, 1)
        normed = residual_norm(tokens, None, self.weight, self.bias, self.eps, dtype=dtype)[1]
        return normed.permute(0, 3, 1, 2)


class ConvPatchEmbed(nn.Module):
    """Patches of 16x16 pixels through two overlapping convs (arXiv 2405.18425, official code).

    Args:
        in_channels: Channels of the image.
        embed_dims: C, channels of a token.
    """

    def __init__(self, in_channels: int, embed_dims: int) -> None:
        super().__init__()
        mid = embed_dims // 2
        self.proj = nn.Sequential(
            PatchConv2d(in_channels, mid, 9, stride=8, padding=1),
            MapNorm(mid, eps=1e-5),
            nn.SiLU(),
            Conv2d(mid, embed_dims, 3, stride=2, padding=1),
            MapNorm(embed_dims, eps=1e-5, wide=True),  # the residual stream starts here
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W), sides multiples of 16, to (B, C, H / 16, W / 16)."""
        return self.proj(x)


def resize_pos_embed(pos_embed: Tensor, hw: tuple[int, int]) -> Tensor:
    """Resizes a square grid (1, M * M, C) to (1, h * w, C), bicubic, in float32.

    Raises:
        ValueError: If the number of positions is no square.
    """
    side = math.isqrt(pos_embed.shape[1])
    if side * side != pos_embed.shape[1]:
        raise ValueError(f'position embedding of {pos_embed.shape[1]} tokens is no square grid')
    # in a compiled graph, which serves any size, resizing to the same one costs less than a graph
    if not torch.compiler.is_compiling() and hw == (side, side):
        return pos_embed
    # everywhere but in eager inference, which keeps the result
    trains = pos_embed.requires_grad and torch.is_grad_enabled()
    if trains or torch.compiler.is_compiling() or is_capturing(pos_embed.device):
        return _resize_by_products(pos_embed, side, hw)
    grid = to_map(pos_embed.float(), (side, side))
    grid = F.interpolate(grid, size=hw, mode='bicubic', align_corners=False)
    return to_tokens(grid).to(pos_embed.dtype)


def _resize_by_products(pos_embed: Tensor, side: int, hw: tuple[int, int]) -> Tensor:
    """The same as two matrix products, since bicubic resizing is linear in rows and columns.

    PyTorch's operator takes 2.2 ms for a map of 50 x 84 tokens of 768 channels on an H200, its
    gradient, atomic additions, 4 ms, of 85 ms that a training step of ViG-B and its adapter takes.
    """
    device = pos_embed.device
    with torch.autocast(device.type, enabled=False):
        rows, cols = (_bicubic(side, n, device) for n in hw)
        grid = (rows @ pos_embed.float().view(side, -1)).view(hw[0], side, -1)
        return (cols @ grid).view(1, hw[0] * hw[1], -1).to(pos_embed.dtype)


def _bicubic(size: int, new_size: int, device: torch.device) -> Tensor:
    """(new_size, size): the weights by which bicubic resizing makes new values of old ones."""
    identity = torch.eye(size, device=device).view(1, size, size, 1)
    weights = F.interpolate(identity, (new_size, 1), mode='bicubic', align_corners=False)
    return weights.view(size, new_size).t()


class PosEmbedResizer:
    """Resizes a position embedding to a token grid; in inference once per size.

    Args:
        max_sizes: Sizes that are kept, those used last, until the parameter changes.
    """

    def __init__(self, max_sizes: int = 8) -> None:
        self._kept = Kept(_resize_to, max_sizes)

    def __call__(self, pos_embed: Tensor, hw: tuple[int, int]) -> Tensor:
        """(1, M * M, C) to (1, h * w, C)."""
        return self._kept(hw, pos_embed)[0]


def _resize_to(hw: tuple[int, int], pos_embed: Tensor) -> tuple[Tensor]:
    return (resize_pos_embed(pos_embed, hw),)
