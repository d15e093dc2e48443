"""Feed-forward networks on tokens."""

from torch import Tensor, nn

from mmvig.kernels import depthwise_conv, swiglu
from mmvig.models.layers.linear import Linear


class SwiGLU(nn.Module):
    """Feed-forward network with a SiLU gate, bias-free (arXiv 2002.05202).

    Args:
        embed_dims: C, channels in and out.
        hidden_dims: Channels between the two linears.
    """

    def __init__(self, embed_dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.gate_proj = Linear(embed_dims, 2 * hidden_dims, bias=False)
        self.down_proj = Linear(hidden_dims, embed_dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) to (…, C)."""
        return self.down_proj(swiglu(self.gate_proj(x)))


class ConvFFN(nn.Module):
    """Feed-forward network of the adapter: a depthwise 3x3 conv, per level, between two linears.

    Source: ViT-Adapter (arXiv 2205.08534), section 3.4; parameter names as in its release.

    Args:
        embed_dims: C, channels in and out.
        hidden_dims: Channels between the two linears.
    """

    def __init__(self, embed_dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dims, hidden_dims)
        self.dwconv = _LevelConv(hidden_dims)
        self.fc2 = Linear(hidden_dims, embed_dims)

    def forward(self, x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """(B, S, C) tokens of levels of the given (height, width), concatenated, to (B, S, C)."""
        return self.fc2(self.dwconv(self.fc1(x), shapes))


class _LevelConv(nn.Module):
    """The same depthwise conv on every level, and GELU."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dims, dims, 3, padding=1, groups=dims)

    def forward(self, x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        return depthwise_conv(x, self.dwconv.weight, shapes, self.dwconv.bias, 'gelu')
