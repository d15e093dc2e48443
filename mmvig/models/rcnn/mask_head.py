"""mmdet's FCN mask head, its targets cut from the masks on the device."""

import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.modules.utils import _pair

from mmvig.datasets.packed_masks import PackedMasks


class PackedMaskHead(FCNMaskHead):
    """mmdet's `FCNMaskHead` for masks that the pipeline packed (`PackMasks`).

    Targets are the same bit for bit. mmdet fetches the boxes from the device, copies the whole
    mask of an object once for every box that it is cut for, and carries the result over the host;
    here every mask is read in its place. Other masks take mmdet's way.
    """

    def get_targets(
        self,
        sampling_results: list[SamplingResult],
        batch_gt_instances: list[InstanceData],
        rcnn_train_cfg: ConfigDict,
    ) -> Tensor:
        """Targets (R, h, w) of all positive boxes; arguments as mmdet's."""
        masks = [truths.masks for truths in batch_gt_instances]
        if not all(isinstance(m, PackedMasks) for m in masks):
            return super().get_targets(sampling_results, batch_gt_instances, rcnn_train_cfg)
        size = _pair(rcnn_train_cfg.mask_size)
        covered = torch.cat(
            [
                m.crop(result.pos_priors, result.pos_assigned_gt_inds, size)
                for m, result in zip(masks, sampling_results, strict=True)
            ]
        )
        if rcnn_train_cfg.get('soft_mask_target', False):
            return covered
        return (covered >= 0.5).float()
