"""RoI features by boxes in full precision, without asking the device which level has which."""

import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor

from mmvig import mmcv_ext
from mmvig.models.rcnn.boxes import OUTSIDE


class Float32RoIExtractor(SingleRoIExtractor):
    """mmdet's `SingleRoIExtractor` for mixed precision; the same in float32.

    mmdet rounds the boxes to the features' precision. In bfloat16 that moves a corner at 1000
    pixels by up to 2, at 1300 pixels by up to 4. Here they stay in float32.

    Each level pools all regions, those of other levels moved out of sight, where they cost
    nothing: so no level waits for the device to say which regions are its own.
    """

    def forward(
        self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Features of regions, each from the level that suits its size.

        Args:
            feats: Maps (B, C, H, W) of the levels, finest first.
            rois: (R, 5), image and x1, y1, x2, y2 in image pixels.
            roi_scale_factor: Scales the regions about their centres, if given.

        Returns:
            (R, C, h, w), in the precision of the maps.
        """
        rois = rois.float()
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        outside = torch.cat([rois[:, :1], torch.full_like(rois[:, 1:], OUTSIDE)], dim=1)
        dtype = feats[0].dtype
        if not mmcv_ext.stands_in():  # the compiled operator wants maps and boxes of one dtype
            feats = tuple(feat.float() for feat in feats)
        pooled = [
            layer(feat, torch.where((levels == level)[:, None], rois, outside))
            for level, (feat, layer) in enumerate(zip(feats, self.roi_layers, strict=False))
        ]
        return sum(pooled[1:], start=pooled[0]).to(dtype)
