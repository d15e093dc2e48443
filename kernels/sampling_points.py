"""Where deformable attention samples, and what each sample counts: checks, autograd, dispatch."""

import torch
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import check_devices, form, run


def sampling_points(
    offsets: Tensor,
    logits: Tensor,
    table: tuple[Tensor, Tensor],
    heads: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """`center + offset * pixel` and the softmax over a head's samples (arXiv 2010.04159).

    On CUDA outside `torch.compile`, which makes kernels of PyTorch's operators itself, one kernel
    each way, differentiable once; gradients to offsets and logits lie side by side in one buffer,
    as a product that made both wants them.

    Args:
        offsets: (B, Q, H * L * P * 2), in pixels of the level, (x, y).
        logits: (B, Q, H * L * P).
        table: The queries' centers, (Q, 2), 0 to 1 across a map, and the size of each level's
            pixel, (L, 2), as shares of the map; float32, constants.
        heads: H, L and P.

    Returns:
        Locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P), in float32 or, if that is wider,
        the dtype of the logits.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    centers, pixel = table
    h, levels, points = heads
    b, q = offsets.shape[:2]
    expected = dict(
        offsets=(offsets, (b, q, 2 * h * levels * points)),
        logits=(logits, (b, q, h * levels * points)),
        centers=(centers, (q, 2)),
        pixel=(pixel, (levels, 2)),
    )
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f'{name} must be {shape}, got {tuple(x.shape)}')
    check_devices(offsets, logits=logits, centers=centers, pixel=pixel)
    has_kernel = form(offsets, logits) == 'eager' and offsets.dtype == logits.dtype
    if not has_kernel or centers.dtype != torch.float32:
        return reference.sampling_points(offsets, logits, table, heads)
    args = (_spaced(offsets), _spaced(logits), centers.contiguous(), pixel.contiguous(), heads)
    return run(_Eager, _launch, *args)


def _spaced(x: Tensor) -> Tensor:
    """With rows evenly spaced over the batch, copied only where they are not."""
    even = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even else x.contiguous()


def _launch(
    offsets: Tensor, logits: Tensor, centers: Tensor, pixel: Tensor, heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.sampling_points_kernels import forward

    return forward(offsets, logits, centers, pixel, heads)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        offsets: Tensor,
        logits: Tensor,
        centers: Tensor,
        pixel: Tensor,
        heads: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor]:
        locations, weights = _launch(offsets, logits, centers, pixel, heads)
        ctx.save_for_backward(weights, pixel)
        ctx.dtype = offsets.dtype
        return locations, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dlocations: Tensor, dweights: Tensor
    ) -> tuple:
        from mmvig.kernels.sampling_points_kernels import backward

        grads = (dlocations.contiguous(), dweights.contiguous())
        return (*backward(*ctx.saved_tensors, *grads, ctx.dtype), None, None, None)
