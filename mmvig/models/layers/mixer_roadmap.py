"""Steps on the way to ViG's mixer: the rows of the paper's ablations, for comparison only.

Shape legend: B batch, N tokens, C channels, H heads, K key dim, V value dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.kernels import bidirectional_gla
from mmvig.models.layers.linear import Linear
from mmvig.models.layers.mixer import GATE_LOW_RANK, BiGLAMixer

GATE_NORMALIZER = 16
SCANS = ('causal', 'shared_gate', 'own_gates', 'two_layers')
# log gate whose exponential is 0 in float32: nothing of the other tokens passes
CLOSED = -200.0


class RoadmapMixer(BiGLAMixer):
    """ViG's mixer without locality injection, and with fewer or more gates and projections.

    Source: arXiv 2405.18425, Tables 3 and 5. In place of the blend with a local branch, the output
    gate is the one of gated linear attention: `silu(g_proj(x)) * g_norm(o)`, without bias
    (arXiv 2312.06635, section 4.4).

    Args:
        embed_dims: C; keys have C / 2 channels in all heads together, values C.
        num_heads: H; must divide C / 2.
        scan: 'causal' scans forwards only; 'shared_gate' in both directions with one gate;
            'own_gates' with a gate for each direction, as ViG; 'two_layers' with queries, keys and
            values for each direction, too.

    Raises:
        ValueError: For an unknown scan, or if the heads do not divide the dims.
    """

    def __init__(self, embed_dims: int, num_heads: int, scan: str) -> None:
        if scan not in SCANS:
            raise ValueError(f'unknown scan {scan!r}: choose one of {", ".join(SCANS)}')
        super().__init__(embed_dims, num_heads)
        c, self.scan = embed_dims, scan
        self.in_proj = self.l_norm = None
        self.g_proj = Linear(c, c, bias=False)
        if scan in ('causal', 'shared_gate'):
            self.gk_proj[1] = Linear(GATE_LOW_RANK, c // 2)
        if scan == 'two_layers':
            self.qkv_proj = Linear(c, 4 * c, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) tokens of an h x w map, row-major, to (B, N, C)."""
        return self.o_proj(F.silu(self.g_proj(x)) * self._norm(self.g_norm, self.attend(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Gated linear attention of (B, N, C) in the directions of `scan`, to (B, N, C)."""
        c = x.shape[-1]
        qkv = self._heads(self.qkv_proj(x), [c // 2, c // 2, c])
        gates = self._heads(F.logsigmoid(self.gk_proj(x).float()) / GATE_NORMALIZER, [c // 2])
        if self.scan == 'causal':
            out = one_direction(*qkv, gates[0])
        elif self.scan == 'two_layers':
            forward = one_direction(*qkv[:3], gates[0])
            out = (forward + one_direction(*qkv[3:], gates[1], backward=True)) / 2
        else:
            out = bidirectional_gla(*qkv, gates[0], gates[-1])
        return out.flatten(2)

    def _norm(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """RMSNorm of each head's channels; one weight of V serves all heads."""
        # under autocast x is half precision, for which PyTorch has no fused norm with this weight
        return norm(x.to(norm.weight.dtype).unflatten(-1, (self.num_heads, -1))).flatten(-2)

    def _heads(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """(B, N, n * sum(sizes)) to n times a tensor (B, N, H, size / H) of each size."""
        parts = x.split(sizes * (x.shape[-1] // sum(sizes)), dim=-1)
        return [part.unflatten(-1, (self.num_heads, -1)) for part in parts]


def one_direction(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, backward: bool = False
) -> Tensor:
    """Gated linear attention in one direction: the bidirectional operator with one gate closed.

    The operator returns the mean of two directions; one whose gate is closed sees each token alone.

    Args:
        q, k, log_gate: (B, N, H, K).
        v: (B, N, H, V).
        backward: From the last token to the first.

    Returns:
        (B, N, H, V).
    """
    closed = torch.full_like(log_gate, CLOSED)
    gates = (closed, log_gate) if backward else (log_gate, closed)
    alone = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5 * v
    return 2 * bidirectional_gla(q, k, v, *gates) - alone
