"""The token mixer of ViG: bidirectional gated linear attention beside a local branch.

Shape legend: B batch, N = h * w tokens, C channels, H heads, K key dim, V value dim.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.kernels import bidirectional_gla
from mmvig.models.layers.embed import to_map, to_tokens

GATE_LOW_RANK = 16
GATE_NORMALIZER = 16
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
        self.in_proj = nn.Sequential(conv, nn.SiLU() if conv_act else nn.Identity())
        self.qkv_proj = nn.Linear(c, 2 * c, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(c, GATE_LOW_RANK, bias=False), nn.Linear(GATE_LOW_RANK, c)
        )
        self.g_proj = nn.Linear(c, c)
        self.g_norm = nn.RMSNorm(c // num_heads, eps=EPS)
        self.l_norm = nn.RMSNorm(c // num_heads, eps=EPS)
        self.out_act = nn.SiLU() if out_act else nn.Identity()
        self.o_proj = nn.Linear(c, c, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) tokens of an h x w map, row-major, to (B, N, C)."""
        local = to_tokens(self.in_proj(to_map(x, hw)))
        mixed = self.attend(local)
        gate = self.g_proj(local).sigmoid()
        y = gate * self._norm(self.g_norm, mixed) + (1 - gate) * self._norm(self.l_norm, local)
        return self.o_proj(self.out_act(y))

    def attend(self, x: Tensor) -> Tensor:
        """Bidirectional GLA of (B, N, C) over all N tokens, to (B, N, C)."""
        c = x.shape[-1]
        q, k, v = self.qkv_proj(x).split([c // 2, c // 2, c], dim=-1)
        log_gates = F.logsigmoid(self.gk_proj(x).float()) / GATE_NORMALIZER
        heads = [t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v, *log_gates.chunk(2, -1))]
        return bidirectional_gla(*heads).flatten(2)

    def _norm(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """RMSNorm of each head's channels; one weight of V serves all heads."""
        # under autocast x is half precision, for which PyTorch has no fused norm with this weight
        return norm(x.to(norm.weight.dtype).unflatten(-1, (self.num_heads, -1))).flatten(-2)
