"""Border align: the strongest point along each side of a box, by bilinear sampling."""

import torch
from torch import Tensor

from mmvig.mmcv_ext.numeric import wide
from mmvig.mmcv_ext.sampling import as_rows, chunks, corners, sample


def border_align_forward(
    input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int
) -> None:
    """Border align (arXiv 2007.11056, equation 2).

    Args:
        input: (B, 4 * C, H, W), C channels each for the top, left, bottom and right side.
        boxes: (B, K, 4), x1, y1, x2, y2 in map pixels.
        output: (B, C, K, 4), written.
        argmax_idx: Like output, int32, written with the best point of each side.
        pool_size: Points of a side, less one.
    """
    maps, boxes = wide(input, boxes)
    channels, size = maps.shape[1] // 4, maps.shape[2:]
    y, x = _side_points(boxes, pool_size)
    for side in range(4):
        rows = as_rows(maps[:, side * channels : (side + 1) * channels])
        for image in range(len(maps)):
            batch = torch.full((1,), image, device=maps.device)
            for part in chunks(boxes.shape[1], 4 * channels * (pool_size + 1)):
                at = (image, slice(part.start, part.stop), side)
                values = sample(rows, size, batch, y[at][None], x[at][None])[0]
                best, index = values.max(1)  # over the points, (K, P, C) -> (K, C)
                output[image, :, part, side] = best.T.to(output.dtype)
                argmax_idx[image, :, part, side] = index.T.to(argmax_idx.dtype)


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    """Writes the gradient of `input`; arguments as in the forward."""
    grads, boxes = wide(grad_output, boxes)
    batch_size, channels, _, _ = grads.shape
    height, width = grad_input.shape[2:]
    index = argmax_idx.long().permute(0, 2, 3, 1)  # (B, K, 4, C)
    y, x = (axis.gather(3, index) for axis in _side_points(boxes, pool_size))
    positions, weights = corners(y, x, height, width)
    # Plane of a gradient: channel c of side s of image b is number (4 b + s) C + c.
    planes = torch.arange(batch_size * 4 * channels, device=boxes.device)
    planes = planes.view(batch_size, 1, 4, channels) * (height * width)
    total = grads.new_zeros(grad_input.numel())
    total.index_add_(
        0, (planes + positions).flatten(), (weights * grads.permute(0, 2, 3, 1)).flatten()
    )
    grad_input.copy_(total.view_as(grad_input))


def _side_points(boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """y and x, each (B, K, 4, pool_size + 1), of the points along top, left, bottom and right.

    The first two sides start at (x1, y1), the other two run back from (x2, y2).
    """
    x1, y1, x2, y2 = boxes.unbind(2)
    step = torch.arange(pool_size + 1, device=boxes.device) / pool_size
    along_x, along_y = (x2 - x1)[..., None] * step, (y2 - y1)[..., None] * step
    still = torch.zeros_like(along_x)
    y = torch.stack([still, along_y, still, -along_y], 2)
    x = torch.stack([along_x, still, -along_x, still], 2)
    start_y, start_x = torch.stack([y1, y1, y2, y2], 2), torch.stack([x1, x1, x2, x2], 2)
    return y + start_y[..., None], x + start_x[..., None]
