"""Deformable attention from what the queries' product gives: in inference one kernel."""

import torch
from torch import Tensor

from mmvig.kernels.dispatch import form, working_dtype
from mmvig.kernels.ms_deform_attn import MAX_HEAD_DIM, ms_deform_attn
from mmvig.kernels.sampling_points import sampling_points


def deform_attn_of_offsets(
    value: Tensor,
    levels: tuple[Tensor, Tensor],
    offsets: Tensor,
    logits: Tensor,
    table: tuple[Tensor, Tensor],
    heads: tuple[int, int, int],
) -> Tensor:
    """`ms_deform_attn` at `sampling_points`: locations and weights are not written in between.

    For one level, without gradients, on CUDA outside `torch.compile`; otherwise the two operators,
    whose backward passes need both. For three levels the kernel takes 168 registers, which cost
    twice what the passes in between take.

    Args:
        value: (B, S, H, D), as of `ms_deform_attn`.
        levels: (height, width) of each level (L, 2), and where it starts in S, (L,).
        offsets, logits, table, heads: As of `sampling_points`.

    Returns:
        (B, Q, H * D) in the dtype of value, or autocast's.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if heads[1] != 1 or not _has_kernel(value, offsets, logits, table[0]):
        points = sampling_points(offsets, logits, table, heads)
        return ms_deform_attn(value, *levels, *points)
    _check(value, levels, offsets, logits, table, heads)
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels import deform_attn_of_offsets_kernels as kernels

    if not kernels.takes(offsets, logits):
        offsets, logits = offsets.contiguous(), logits.contiguous()
    return kernels.forward(value.to(working_dtype(value)), levels, offsets, logits, table, heads)


def _has_kernel(value: Tensor, offsets: Tensor, logits: Tensor, centers: Tensor) -> bool:
    if torch.is_grad_enabled() or form(value, offsets, logits) != 'eager':
        return False
    dtypes = offsets.dtype == logits.dtype and centers.dtype == torch.float32
    return dtypes and offsets.numel() > 0 and value.ndim == 4 and value.shape[3] <= MAX_HEAD_DIM


def _check(
    value: Tensor,
    levels: tuple[Tensor, Tensor],
    offsets: Tensor,
    logits: Tensor,
    table: tuple[Tensor, Tensor],
    heads: tuple[int, int, int],
) -> None:
    """Raises ValueError for arguments that do not fit together."""
    b, q = offsets.shape[:2]
    h, n_levels, points = heads
    samples = h * n_levels * points
    expected = dict(
        value=(value, (b, value.shape[1], h, value.shape[3])),
        shapes=(levels[0], (n_levels, 2)),
        starts=(levels[1], (n_levels,)),
        offsets=(offsets, (b, q, 2 * samples)),
        logits=(logits, (b, q, samples)),
        centers=(table[0], (q, 2)),
        pixel=(table[1], (n_levels, 2)),
    )
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f'{name} must be {shape}, got {tuple(x.shape)}')
        if x.device != value.device:
            raise ValueError(f'{name} is on {x.device}, value on {value.device}')
