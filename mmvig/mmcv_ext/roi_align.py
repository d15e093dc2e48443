"""RoIAlign: average pooling with torchvision's kernels, max pooling by bilinear sampling."""

from collections.abc import Iterator

import torch
import torchvision  # noqa: F401, registers torch.ops.torchvision
from torch import Tensor

from mmvig.mmcv_ext.numeric import store, wide
from mmvig.mmcv_ext.roi_grid import Points, average_backward, maximum, pick, region_grid
from mmvig.mmcv_ext.sampling import as_rows, chunks, corners, sample

_AVERAGE = 1  # of mmcv's pool_mode; 0 is max


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (arXiv 1703.06870, section 3), in float32 or wider.

    Args:
        input: (B, C, H, W).
        rois: (R, 5), map index, x1, y1, x2, y2 in image pixels; entries that are not finite count
            as 0, as torchvision's kernels would read outside of memory for them.
        output: (R, C, aligned_height, aligned_width), written.
        argmax_y, argmax_x: Like output, written with the best point of each bin in max pooling,
            -1 where a bin has none; empty in average pooling.
        aligned_height, aligned_width: Bins of a region.
        spatial_scale: Map pixels for one image pixel.
        sampling_ratio: Points along each side of a bin; 0 takes one a pixel.
        pool_mode: 0 for max, 1 for average.
        aligned: Whether to shift by half a pixel, so that pixel centres lie at half-integers.
    """
    maps, regions = wide(input, rois.nan_to_num(0, 0, 0))
    if pool_mode != _AVERAGE:
        argmax = (argmax_y, argmax_x)
        _max_forward(maps, regions, output, argmax, spatial_scale, sampling_ratio, aligned)
        return
    bins = (aligned_height, aligned_width)
    pooled = torch.ops.torchvision.roi_align(
        maps, regions, spatial_scale, *bins, sampling_ratio, aligned
    )
    store(output, pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the gradient of `input`; arguments as in the forward."""
    grads, regions = wide(grad_output, rois.nan_to_num(0, 0, 0))
    bins = (aligned_height, aligned_width)
    if pool_mode != _AVERAGE:
        _max_backward(grads, regions, (argmax_y, argmax_x), grad_input)
    elif grads.is_cuda and torch.are_deterministic_algorithms_enabled():
        # torchvision's CUDA kernel adds in no fixed order, and refuses.
        args = (regions, bins, spatial_scale, sampling_ratio, aligned)
        parts = _points(1, *args)
        grad_input.copy_(average_backward(parts, grads, grad_input.shape))
    else:
        shape = grad_input.shape
        grads = torch.ops.torchvision._roi_align_backward(
            grads, regions, spatial_scale, *bins, *shape, sampling_ratio, aligned
        )
        store(grad_input, grads)


def _max_forward(
    maps: Tensor,
    regions: Tensor,
    output: Tensor,
    argmax: tuple[Tensor, Tensor],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Max pooling in plain PyTorch: no model of mmdet or mmseg asks for it."""
    rows = as_rows(maps)
    args = (regions, output.shape[2:], spatial_scale, sampling_ratio, aligned)
    for part, batch, y, x, valid in _points(maps.shape[1], *args):
        best, index = maximum(sample(rows, maps.shape[2:], batch, y, x), valid)
        output[part] = best.to(output.dtype)
        for target, positions in zip(argmax, (y, x), strict=True):
            target[part] = pick(positions, index).to(target.dtype)


def _max_backward(
    grads: Tensor, regions: Tensor, argmax: tuple[Tensor, Tensor], grad_input: Tensor
) -> None:
    """Sends each bin's gradient to the four pixels around its best point."""
    _, channels, height, width = grad_input.shape
    positions, weights = corners(*wide(*argmax), height, width)
    weights = weights * (argmax[0] != -1)
    channel = torch.arange(channels, device=regions.device)[:, None, None]
    planes = regions[:, 0].long()[:, None, None, None] * channels + channel
    positions = positions + planes * (height * width)
    total = grads.new_zeros(grad_input.numel())
    total.index_add_(0, positions.flatten(), (weights * grads).flatten().to(grads.dtype))
    grad_input.copy_(total.view_as(grad_input))


def _points(
    elements_each: int,
    regions: Tensor,
    bins: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Iterator[Points]:
    """Yields the points of some regions at a time: what holds `elements_each` a point fits."""
    x1, y1, x2, y2 = (regions[:, 1:] * spatial_scale - (0.5 if aligned else 0)).unbind(1)
    height, width = y2 - y1, x2 - x1
    if not aligned:  # mmcv's old convention: at least one pixel a side
        height, width = height.clamp(min=1), width.clamp(min=1)
    grid = region_grid(height, width, bins, sampling_ratio)
    batch = regions[:, 0].long()
    for part in chunks(len(regions), 4 * elements_each * grid.points_each()):
        y, x, valid = grid.points(part)
        y, x = y + y1[part, None, None, None], x + x1[part, None, None, None]
        yield part, batch[part], y, x, valid
