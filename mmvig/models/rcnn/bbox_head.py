"""mmdet's box head with two shared layers; its losses do not wait for the device."""

from typing import Any

import torch
from mmdet.models.losses import accuracy
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmengine.config import ConfigDict
from torch import Tensor


class BatchedBBoxHead(Shared2FCBBoxHead):
    """mmdet's `Shared2FCBBoxHead` with the same losses, in RoI heads that do not use its targets.

    Those are the standard one, `BatchedRoIHead` and cascades, not `DynamicRoIHead`, `PISARoIHead`.

    How many boxes are positive is known from the sampling, and that they come first; mmdet looks
    for them on the device, eight times a step, and computes each image's targets by itself.

    Raises:
        ValueError: For settings that only mmdet's own head has.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = dict(with_cls=True, with_reg=True, reg_decoded_bbox=False)
        settings['custom_activation'] = False  # of the loss
        for name, expected in settings.items():
            if getattr(self, name) != expected:
                raise ValueError(
                    f'{type(self).__name__} takes {name}={expected}, got {getattr(self, name)}; '
                    'use Shared2FCBBoxHead'
                )

    def loss_and_target(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        sampling_results: list[SamplingResult],
        rcnn_train_cfg: ConfigDict,
        concat: bool = True,
        reduction_override: str | None = None,
    ) -> dict[str, dict | tuple]:
        """Losses of all boxes; arguments as mmdet's, of whose targets labels and weights come back.

        Raises:
            ValueError: If targets of each image, or losses in another form were wanted.
        """
        if reduction_override or not concat:
            raise ValueError(
                f'{type(self).__name__} computes mean losses of a batch, got '
                f'{reduction_override=}, {concat=}; use Shared2FCBBoxHead'
            )
        positives = [len(r.pos_priors) for r in sampling_results]
        negatives = [len(r.neg_priors) for r in sampling_results]
        rows = [part for pair in zip(positives, negatives, strict=True) for part in pair]
        own_labels = [r.pos_gt_labels for r in sampling_results]
        labels = rois.new_full((len(rois),), self.num_classes, dtype=torch.long)
        weights = torch.ones_like(rois[:, 0])
        parts = zip(labels.split(rows)[::2], weights.split(rows)[::2], own_labels, strict=True)
        for part, weight, own in parts:
            part.copy_(own)
            if rcnn_train_cfg.pos_weight > 0:
                weight.fill_(rcnn_train_cfg.pos_weight)
        deltas = torch.cat(bbox_pred.split(rows)[::2])
        box_loss = self._box_loss(deltas, torch.cat(own_labels), sampling_results, len(rois))
        losses = dict(
            loss_cls=self.loss_cls(cls_score, labels, weights, avg_factor=max(len(rois), 1)),
            acc=accuracy(cls_score, labels),
            loss_bbox=box_loss,
        )
        return dict(loss_bbox=losses, bbox_targets=(labels, weights))

    def _box_loss(
        self, deltas: Tensor, labels: Tensor, samples: list[SamplingResult], count: int
    ) -> Tensor:
        if len(deltas) == 0:
            return deltas.sum()
        if not self.reg_class_agnostic:
            own = torch.arange(len(labels), device=labels.device)
            deltas = deltas.unflatten(1, (self.num_classes, -1))[own, labels]
        targets = self.bbox_coder.encode(
            torch.cat([s.pos_priors for s in samples]),
            torch.cat([s.pos_gt_bboxes for s in samples]),
        )
        return self.loss_bbox(deltas, targets, avg_factor=count)
