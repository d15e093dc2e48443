"""mmdet's standard RoI head, its boxes assigned and sampled for a whole batch at once."""

import torch
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mmvig.models.rcnn.assign import MaxIoURule, RandomRule, assign, draw
from mmvig.models.rcnn.boxes import pad_rows


class BatchedRoIHead(StandardRoIHead):
    """mmdet's `StandardRoIHead` with the same results, asking the device once instead of 30 times.

    Takes its arguments, with a `MaxIoUAssigner` and a `RandomSampler`.

    Raises:
        ValueError: For settings of either that only mmdet's own code has.
    """

    def init_assigner_sampler(self) -> None:
        """Builds both, as mmdet does, and reads their settings."""
        super().init_assigner_sampler()
        if self.train_cfg:
            self._assign_rule = MaxIoURule.of(self.bbox_assigner)
            self._draw_rule = RandomRule.of(self.bbox_sampler)

    def loss(
        self,
        x: tuple[Tensor, ...],
        rpn_results_list: list[InstanceData],
        batch_data_samples: list[DetDataSample],
    ) -> dict[str, Tensor]:
        """Losses of a batch; arguments and results as mmdet's."""
        truths = [sample.gt_instances for sample in batch_data_samples]
        samples = self.sample([r.bboxes for r in rpn_results_list], truths)
        box = self.bbox_loss(x, samples)
        losses = dict(box['loss_bbox'])
        if self.with_mask:
            masks = self.mask_loss(x, samples, box['bbox_feats'], truths)
            losses.update(masks['loss_mask'])
        return losses

    @torch.no_grad()
    def sample(self, proposals: list[Tensor], truths: list[InstanceData]) -> list[SamplingResult]:
        """Assigns the proposals (N_b, 4) of each image and draws those to train on."""
        boxes, is_box = pad_rows(proposals)
        gt_boxes, is_truth = pad_rows([t.bboxes for t in truths])
        labels, _ = pad_rows([t.labels for t in truths], fill=-1)
        index, iou = assign(boxes, gt_boxes, is_truth, self._assign_rule)
        index = torch.where(is_box, index, -1)
        if self._draw_rule.add_gt_as_proposals:
            own = torch.arange(1, is_truth.shape[1] + 1, device=index.device)
            index = torch.cat([torch.where(is_truth, own, -1), index], 1)
            iou = torch.cat([is_truth.to(iou.dtype), iou], 1)
            boxes = torch.cat([gt_boxes, boxes], 1)
        picks = draw(index, self._draw_rule)
        counts = torch.stack([picks.is_positive.sum(1), picks.is_negative.sum(1)], 1)
        is_gt = torch.zeros_like(index, dtype=torch.uint8)
        is_gt[:, : boxes.shape[1] - is_box.shape[1]] = 1
        if labels.shape[1]:
            labels = torch.where(index > 0, labels.gather(1, (index - 1).clamp(min=0)), -1)
        else:
            labels = torch.full_like(index, -1)
        return [
            SamplingResult(
                pos_inds=picks.positive[i, :num_pos],
                neg_inds=picks.negative[i, :num_neg],
                priors=boxes[i],
                gt_bboxes=truths[i].bboxes,
                assign_result=AssignResult(len(truths[i]), index[i], iou[i], labels[i]),
                gt_flags=is_gt[i],
            )
            for i, (num_pos, num_neg) in enumerate(counts.tolist())  # waits for the device
        ]
