"""mmdet's coder of boxes; it does not wait for the device."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.structures.bbox import BaseBoxes, get_box_tensor
from torch import Tensor


class AsyncDeltaXYWHBBoxCoder(DeltaXYWHBBoxCoder):
    """mmdet's `DeltaXYWHBBoxCoder`, with its means and deviations kept on the device.

    mmdet's copies both there in every call and waits for that, and so for all before it. Takes its
    arguments; deltas and boxes are the same to the bit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}

    def encode(self, bboxes: Tensor | BaseBoxes, gt_bboxes: Tensor | BaseBoxes) -> Tensor:
        """Boxes (..., 4) and their ground truths to deltas (..., 4), float32."""
        if len(bboxes) != len(gt_bboxes):
            return super().encode(bboxes, gt_bboxes)
        boxes, truths = (get_box_tensor(b).float() for b in (bboxes, gt_bboxes))
        centers, sides = _centers_and_sides(boxes)
        gt_centers, gt_sides = _centers_and_sides(truths)
        deltas = [(gt_centers - centers) / sides, torch.log(gt_sides / sides)]
        means, stds = self._constants(boxes)
        return torch.cat(deltas, -1).sub_(means).div_(stds)

    def decode(
        self,
        bboxes: Tensor | BaseBoxes,
        pred_bboxes: Tensor,
        max_shape: Sequence[int] | Tensor | Sequence[Sequence[int]] | None = None,
        wh_ratio_clip: float | None = 16 / 1000,
    ) -> Tensor | BaseBoxes:
        """Boxes (N, 4) and deltas (N, 4 or 4 x classes) to boxes; other cases are mmdet's own."""
        one_image = pred_bboxes.ndim == 2 and 0 < len(pred_bboxes) == len(bboxes)
        numbers = max_shape is None or (len(max_shape) > 0 and isinstance(max_shape[0], int))
        others = self.add_ctr_clamp or self.use_box_type or torch.onnx.is_in_onnx_export()
        if others or not (one_image and numbers):
            return super().decode(bboxes, pred_bboxes, max_shape, wh_ratio_clip)
        deltas = pred_bboxes.unflatten(1, (-1, 4))
        means, stds = self._constants(deltas)
        deltas = deltas * stds + means
        centers, sides = _centers_and_sides(get_box_tensor(bboxes)[:, None])
        limit = abs(math.log(wh_ratio_clip))
        centers = centers + sides * deltas[..., :2]
        half = sides * deltas[..., 2:].clamp(min=-limit, max=limit).exp() * 0.5
        decoded = torch.cat([centers - half, centers + half], -1)
        if self.clip_border and max_shape is not None:
            decoded[..., 0::2].clamp_(min=0, max=max_shape[1])
            decoded[..., 1::2].clamp_(min=0, max=max_shape[0])
        return decoded.flatten(1)

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (4,), on the device and in the dtype of a tensor."""
        key = (like.device, like.dtype)
        if key not in self._kept:
            with torch.inference_mode(False):  # they may be needed for gradients later
                self._kept[key] = like.new_tensor(self.means), like.new_tensor(self.stds)
        return self._kept[key]


def _centers_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low
