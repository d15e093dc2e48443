"""The token mixer of ViG: bidirectional gated linear attention beside a local branch.

Shape legend: B batch, N = h * w tokens, C channels, H heads, K key dim, V value dim.
"""

from torch import Tensor, nn

from mmvig.kernels import bidirectional_gla, depthwise_conv, gated_head_norm, log_gates
from mmvig.models.layers.linear import Linear, merged_linear

GATE_LOW_RANK = 16
EPS = 1e-6


class BiGLAMixer(nn.Module):
    """Depthwise conv, bidirectional GLA over all tokens, and a gate that blends the two.

    Source: arXiv 2405.18425, sections 3.2 (direction-wise gates) and 3.3 (locality injection).
    Parameter names are those of the official checkpoints.

    Args:
        embed_dims: C; keys have C / 2 channels in all heads together, values C.
        num_heads: H; must divide C / 2.
        conv_act: SiLU after the depthwise conv.
        out_act: SiLU before the output projection.

    Raises:
        ValueError: If the heads do not divide the dims.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, conv_act: bool = False, out_act: bool = False
    ) -> None:
        super().__init__()
        if embed_dims % (2 * num_heads):
            raise ValueError(
                f'embed_dims ({embed_dims}) must be divisible by 2 * num_heads ({2 * num_heads}): '
                'every head needs the same number of key channels'
            )
        c, self.num_heads = embed_dims, num_heads
        conv = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False)
        self.in_proj = nn.Sequential(conv)
        self.qkv_proj = Linear(c, 2 * c, bias=False)
        self.gk_proj = nn.Sequential(Linear(c, GATE_LOW_RANK, bias=False), Linear(GATE_LOW_RANK, c))
        self.g_proj = Linear(c, c)
        self.g_norm = nn.RMSNorm(c // num_heads, eps=EPS)
        self.l_norm = nn.RMSNorm(c // num_heads, eps=EPS)
        self.conv_act, self.out_act = conv_act, out_act
        self.o_proj = Linear(c, c, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) tokens of an h x w map, row-major, to (B, N, C)."""
        conv = self.in_proj[0]
        local = depthwise_conv(x, conv.weight, [hw], act='silu' if self.conv_act else 'none')
        # one product for all that read the same tokens; the gate's bias comes in further down
        qkv, gate, low = merged_linear(
            local, [self.qkv_proj.weight, self.g_proj.weight, self.gk_proj[0].weight]
        )
        mixed = self._attend(qkv, low)
        norms = (self.g_norm.weight, self.l_norm.weight)
        args = (mixed, local, gate, *norms, self.g_proj.bias, self.out_act, EPS)
        return self.o_proj(gated_head_norm(*args))

    def _attend(self, qkv: Tensor, low: Tensor) -> Tensor:
        """Bidirectional GLA over all N tokens.

        Args:
            qkv: (B, N, 2 C), queries, keys and values, C / 2, C / 2 and C channels.
            low: (B, N, 16), the low-rank vector that the gates are made of.

        Returns:
            (B, N, C).
        """
        c = qkv.shape[-1] // 2
        gates = log_gates(low, self.gk_proj[1].weight, self.gk_proj[1].bias)
        qkv = qkv.split([c // 2, c // 2, c], dim=-1)
        heads = [t.unflatten(-1, (self.num_heads, -1)) for t in (*qkv, *gates)]
        return bidirectional_gla(*heads).flatten(2)
