"""Every operator of this package in plain PyTorch: its definition, written to be read.

Shape legend: B batch, N tokens, H heads, K key dim, V value dim; S value tokens, Q queries,
L levels, P points, D channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_fwd: Tensor,
    log_gate_bwd: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Bidirectional gated linear attention, one token at a time (arXiv 2405.18425, section 3.2).

    Per head and direction: `S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t`, `o_t = scale * q_t S_t`;
    the backward direction runs from the last token to the first with its own gate, taken at
    token t. Both include the current token, and the result is the mean of the two.

    Args:
        q, k: (B, N, H, K).
        v: (B, N, H, V).
        log_gate_fwd, log_gate_bwd: (B, N, H, K), natural logarithms of the gates, at most 0.
        scale: Factor of q; `K ** -0.5` where None.

    Returns:
        (B, N, H, V) in the dtype of q; computed in that dtype or float32, whichever is wider.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
    q_ = q_ * (q.shape[-1] ** -0.5 if scale is None else scale)
    total = torch.zeros_like(v_)
    for log_gate, tokens in (
        (log_gate_fwd, range(q.shape[1])),
        (log_gate_bwd, reversed(range(q.shape[1]))),
    ):
        gate = log_gate.to(dtype).exp()
        state = q_.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
        outs = {}
        for t in tokens:
            state = gate[:, t, :, :, None] * state + k_[:, t, :, :, None] * v_[:, t, :, None, :]
            outs[t] = torch.einsum('bhk,bhkv->bhv', q_[:, t], state)
        total = total + torch.stack([outs[t] for t in range(q.shape[1])], dim=1)
    return (total / 2).to(q.dtype)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159, equation 3) with `grid_sample`.

    Every query of a head is the weighted sum of bilinear samples of that head's value maps; samples
    outside a map are 0, and pixel centres lie at half-integers (`align_corners=False`).

    Args:
        value: (B, S, H, D), the maps of all levels, flattened row-major and concatenated.
        spatial_shapes: (L, 2), integers, (height, width) of each level.
        level_start_index: (L,), integers, where each level starts in S.
        sampling_locations: (B, Q, H, L, P, 2), (x, y), 0 to 1 across a map.
        attention_weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D) in the dtype of value; computed in that dtype or float32, whichever is wider.
    """
    b, _, h, d = value.shape
    q = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    grids = 2 * sampling_locations.to(dtype) - 1
    out = value.new_zeros(b * h, d, q, dtype=dtype)
    levels = zip(spatial_shapes.tolist(), level_start_index.tolist(), strict=True)
    for level, ((height, width), start) in enumerate(levels):
        maps = value[:, start : start + height * width].to(dtype).permute(0, 2, 3, 1)
        if maps.numel() == 0:
            continue
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(maps.reshape(b * h, d, height, width), grid, align_corners=False)
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
        out = out + (samples * weights[:, None].to(dtype)).sum(-1)
    return out.view(b, h * d, q).transpose(1, 2).to(value.dtype).contiguous()
