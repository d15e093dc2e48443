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


def swiglu(x: Tensor) -> Tensor:
    """`silu(a) * b` for x = [a, b], (..., 2 F) to (..., F) (arXiv 2002.05202, equation 6)."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(a) * b).to(x.dtype)


def swiglu_product(x: Tensor, weight: Tensor) -> Tensor:
    """`swiglu(x @ weight^T)`, (..., C) and (2 F, C) to (..., F), rounded in between."""
    return swiglu(F.linear(x, weight))


def residual_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`s = x + keep * y` and its norm: RMSNorm (arXiv 1910.07467), with bias LayerNorm.

    Args:
        x, y: (B, ..., C); y may be None.
        weight, bias: (C,).
        eps: Added to the variance or the mean square.
        keep: (B,) or None.
        dtype: Of the norm; that of x where None.

    Returns:
        s and its norm, computed in float32 or wider.
    """
    total = x
    if y is not None:
        if keep is not None:
            y = y * keep.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
        total = x + y
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    weight = weight.to(wide.dtype)
    if bias is None:
        out = F.rms_norm(wide, weight.shape, weight, eps)
    else:
        out = F.layer_norm(wide, weight.shape, weight, bias.to(wide.dtype), eps)
    return total, out.to(x.dtype if dtype is None else dtype)


def gated_head_norm(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None = None,
    silu: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """`s * rms_norm(x) + (1 - s) * rms_norm(local)`, s = sigmoid(gate + gate_bias), norms per head.

    Args:
        x, local, gate: (..., H * V).
        weight_x, weight_local: (V,), shared by all heads.
        gate_bias: (H * V,) or None.
        silu: Whether SiLU is applied to the result.
        eps: Added to the mean squares.

    Returns:
        (..., H * V) in the dtype of x; computed in that dtype or float32, whichever is wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    share = (gate.to(dtype) if gate_bias is None else gate.to(dtype) + gate_bias).sigmoid()
    normed = [
        F.rms_norm(t.to(dtype).unflatten(-1, (-1, w.numel())), w.shape, w.to(dtype), eps)
        for t, w in ((x, weight_x), (local, weight_local))
    ]
    out = share * normed[0].flatten(-2) + (1 - share) * normed[1].flatten(-2)
    return (F.silu(out) if silu else out).to(x.dtype)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    shapes: list[tuple[int, int]],
    bias: Tensor | None = None,
    act: str = 'none',
) -> Tensor:
    """Depthwise 3x3 conv with padding 1 on the tokens of maps, one after another; an activation.

    Args:
        x: (B, S, C), S tokens of maps of the given (height, width), row-major, concatenated.
        weight: (C, 1, 3, 3).
        shapes: (height, width) of each map.
        bias: (C,) or None.
        act: 'none', 'silu' or 'gelu'.

    Returns:
        (B, S, C) in the dtype of x; computed in that dtype or float32, whichever is wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    outs = []
    for tokens, hw in zip(x.split([h * w for h, w in shapes], dim=1), shapes, strict=True):
        maps = tokens.to(dtype).unflatten(1, hw).permute(0, 3, 1, 2)
        out = F.conv2d(maps, weight, bias, padding=1, groups=weight.shape[0])
        outs.append(out.flatten(2).transpose(1, 2))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return {'none': lambda t: t, 'silu': F.silu, 'gelu': F.gelu}[act](out).to(x.dtype)


def log_gates(
    low: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`logsigmoid(low @ weight.T + bias) / 16`, halved: gates of both directions.

    Args:
        low: (..., R), what all heads share (arXiv 2312.06635, section 4.4).
        weight: (C, R).
        bias: (C,).
        dtype: Of the result; float32 or that of low, whichever is wider, where None.

    Returns:
        (..., C / 2) for each direction.
    """
    wide = torch.promote_types(low.dtype, torch.float32)
    gates = F.linear(low.to(wide), weight.to(wide), bias.to(wide)).to(wide)
    gates = F.logsigmoid(gates) / 16
    fwd, bwd = gates.to(wide if dtype is None else dtype).chunk(2, dim=-1)
    return fwd, bwd


def resized_sum(
    x: Tensor,
    tokens: Tensor,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`x + y + bias + resize(tokens)`, bilinear, and on request batch norm by given statistics.

    Args:
        x, y: (B, C, H, W); y may be None.
        tokens: (B, C, h, w).
        bias: (C,) or None.
        norm: Mean, variance, weight and bias, (C,) each; or None.
        eps: Added to the variance.

    Returns:
        (B, C, H, W) in the dtype of x; computed in that dtype or float32, whichever is wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    out, tokens = x.to(dtype), tokens.to(dtype)
    if y is not None:
        out = out + y.to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)[:, None, None]
    if tokens.shape[2:] != x.shape[2:]:
        tokens = F.interpolate(tokens, x.shape[2:], mode='bilinear', align_corners=False)
    out = out + tokens
    if norm is not None:
        mean, var, weight, shift = (t.to(dtype) for t in norm)
        out = F.batch_norm(out, mean, var, weight, shift, False, 0.0, eps)
    return out.to(x.dtype)


def finest_map(
    x: Tensor,
    y: Tensor,
    project: Tensor,
    tokens: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: float = 1e-5,
) -> Tensor:
    """`shuffle(x) + project(y) + bias + resize(tokens)`, and batch norm by given statistics.

    Args:
        x: (B, H / 2, W / 2, 4 * C), four pixels a row, C channels each.
        y: (B, CY, H, W).
        project: (C, CY).
        tokens: (B, C, h, w).
        bias, norm, eps: As of `resized_sum`.

    Returns:
        (B, C, H, W) in the dtype of x; computed in that dtype or float32, whichever is wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    projected = F.conv2d(y.to(dtype), project.to(dtype)[:, :, None, None])
    return resized_sum(shuffle(x.to(dtype)), tokens, projected, bias, norm, eps).to(x.dtype)


def shuffle(x: Tensor) -> Tensor:
    """(B, H / 2, W / 2, 4 * C), four pixels a row, to (B, C, H, W)."""
    squares = x.unflatten(-1, (2, 2, -1))  # (B, H / 2, W / 2, 2, 2, C)
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def batch_norm(
    x: Tensor,
    running: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    pool: bool = False,
) -> Tensor:
    """Batch norm (arXiv 1502.03167), then on request ReLU and 3x3 max pooling with stride 2.

    Args:
        x: (B, C, H, W).
        running: (C,) each, mean and variance; in training they move towards those of x.
        weight, bias: (C,).
        training: Whether the statistics of x count, or the running ones.
        momentum: The share of a running statistic that is replaced.
        eps: Added to the variance.
        relu, pool: What follows; pooling has padding 1.

    Returns:
        (B, C, H, W), pooled (B, C, (H + 1) // 2, (W + 1) // 2), in the dtype of x.
    """
    out = F.batch_norm(x, *running, weight, bias, training, momentum, eps)
    out = F.relu(out, inplace=True) if relu else out
    return F.max_pool2d(out, 3, stride=2, padding=1) if pool else out


def sampling_points(
    offsets: Tensor, logits: Tensor, table: tuple[Tensor, Tensor], heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """`center + offset * pixel` and the softmax over a head's samples (arXiv 2010.04159).

    Args:
        offsets, logits: (B, Q, H * L * P * 2) and (B, Q, H * L * P).
        table: Centers of the queries (Q, 2), and pixels of the levels (L, 2).
        heads: H, L and P.

    Returns:
        (B, Q, H, L, P, 2) and (B, Q, H, L, P), in float32 at least.
    """
    centers, pixel = table
    locations = centers[:, None, None, None] + offsets.unflatten(-1, (*heads, 2)) * pixel[:, None]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.unflatten(-1, (heads[0], -1)).softmax(-1, dtype=dtype)
    return locations, weights.unflatten(-1, heads[1:])


def stem_conv(
    x: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """A 3x3 conv with stride 2 and padding 1; on request batch norm by given statistics, ReLU.

    Args:
        x: (B, CIN, H, W).
        weight: (C, CIN, 3, 3).
        norm: Mean, variance, weight and bias, (C,) each; or None.
        eps: Added to the variance.
        relu: Whether ReLU follows.

    Returns:
        (B, C, (H + 1) // 2, (W + 1) // 2) in the dtype of x.
    """
    out = F.conv2d(x, weight.to(x.dtype), stride=2, padding=1)
    if norm is not None:
        out = F.batch_norm(out, *norm, False, 0.0, eps)
    return F.relu(out) if relu else out


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """A conv of few channels and large windows.

    Args:
        x: (B, CIN, H, W).
        weight, bias: (C, CIN, height, width) and (C,).
        stride, padding: Of the conv.

    Returns:
        (B, C, OH, OW) in the dtype of x.
    """
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), stride, padding)


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (B, CIN, H, W) in a dtype, channels last in memory."""
    return x.to(dtype=dtype, memory_format=torch.channels_last)
