"""Backward of `ms_deform_attn` in plain PyTorch, without autograd.

An implementation of a `torch.library` operator runs below autograd, which cannot record there; the
operator needs this where no kernel of ours applies, such as on the CPU under `torch.compile`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def backward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to value, locations and weights; notation as in `reference.ms_deform_attn`.

    Args:
        grad: (B, Q, H * D), the output's gradient.
    """
    b, _, h, d = value.shape
    q, n_levels, p = locations.shape[1], *locations.shape[3:5]
    dtype = torch.promote_types(value.dtype, torch.float32)
    grids = 2 * locations.to(dtype) - 1
    grad = grad.to(dtype).view(b, q, h, d).permute(0, 2, 3, 1).reshape(b * h, d, q, 1)
    d_value = torch.zeros_like(value, dtype=dtype)
    d_locations = torch.zeros_like(locations, dtype=dtype)
    d_weights = torch.zeros_like(weights, dtype=dtype)
    for level in range(n_levels):
        (height, width), start = shapes[level].tolist(), starts[level].item()
        tokens = slice(start, start + height * width)
        maps = value[:, tokens].to(dtype).permute(0, 2, 3, 1).reshape(b * h, d, height, width)
        if maps.numel() == 0:
            continue
        grid = grids[:, :, :, level].transpose(1, 2).reshape(b * h, q, p, 2)
        weight = weights[:, :, :, level].to(dtype).transpose(1, 2).reshape(b * h, 1, q, p)
        samples = F.grid_sample(maps, grid, align_corners=False)
        d_weight = (samples * grad).sum(1)
        # Bilinear interpolation, zeros outside, align_corners=False, both gradients.
        d_maps, d_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad * weight, maps, grid, 0, 0, False, [True, True]
        )
        d_value[:, tokens] += d_maps.view(b, h, d, -1).permute(0, 3, 1, 2)
        d_locations[:, :, :, level] = 2 * d_grid.view(b, h, q, p, 2).transpose(1, 2)
        d_weights[:, :, :, level] = d_weight.view(b, h, q, p).transpose(1, 2)
    return d_value.to(value.dtype), d_locations.to(locations.dtype), d_weights.to(weights.dtype)
