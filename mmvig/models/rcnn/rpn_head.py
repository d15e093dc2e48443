"""mmdet's RPN head for a whole batch at once.

Shape legend: B images, L levels, A anchors of all levels, K boxes of a level that reach NMS.
"""

from collections import OrderedDict

import torch
from mmdet.models.dense_heads import RPNHead
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from mmvig.models.rcnn.assign import MaxIoURule, Picks, RandomRule, assign, draw
from mmvig.models.rcnn.boxes import pad_rows, suppress

# Sizes whose anchors are kept, 6 MiB each at 1333 x 800; AspectRatioBatchSampler repeats a few.
_CACHED_SIZES = 8


class BatchedRPNHead(RPNHead):
    """mmdet's `RPNHead`, with the same parameters, losses and proposals, several times faster.

    What mmdet computes for each image, level and ground truth in turn is computed for all of them
    together; losses are taken at the sampled anchors instead of at all with weight 0; levels are
    suppressed side by side. Proposals are decoded in float32: mmdet rounds anchors to the maps'
    precision, in bfloat16 to 4 pixels beyond 512.

    Takes `RPNHead`'s arguments, with a `MaxIoUAssigner` and a `RandomSampler`.

    Raises:
        ValueError: For settings that only mmdet's own head has.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        self._anchors: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()
        if not self.use_sigmoid_cls or self.reg_decoded_bbox:
            raise ValueError(
                f'{type(self).__name__} takes a sigmoid loss and encoded boxes, got use_sigmoid='
                f'{self.use_sigmoid_cls}, reg_decoded_bbox={self.reg_decoded_bbox}'
            )
        if not self.train_cfg:
            return
        if self.train_cfg['allowed_border'] >= 0:
            raise ValueError(
                f'{type(self).__name__} takes allowed_border=-1, got '
                f'{self.train_cfg["allowed_border"]}'
            )
        self._assign_rule = MaxIoURule.of(self.assigner)
        self._draw_rule = RandomRule.of(self.sampler)

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch; arguments as mmdet's, each loss summed over the levels."""
        anchors, cells = self._anchors_of(cls_scores)
        truths, is_truth = pad_rows([g.bboxes for g in batch_gt_instances])
        with torch.no_grad():
            inside = self._inside(cells, batch_img_metas)
            boxes = anchors * inside[..., None]  # without area: overlaps nothing
            index = assign(boxes, truths, is_truth, self._assign_rule).index
            index = torch.where(inside, index, -1)
            picks = draw(index, self._draw_rule)
        sampled = picks.is_positive.sum(1).clamp(min=1) + picks.is_negative.sum(1).clamp(min=1)
        avg_factor = sampled.sum()
        return dict(
            loss_rpn_cls=self._objectness_loss(cls_scores, picks, avg_factor),
            loss_rpn_bbox=self._box_loss(bbox_preds, picks, avg_factor, anchors, truths, index),
        )

    def _objectness_loss(self, scores: list[Tensor], picks: Picks, avg_factor: Tensor) -> Tensor:
        picked = torch.cat([picks.positive, picks.negative], 1)
        weights = torch.cat([picks.is_positive, picks.is_negative], 1).float()
        labels = torch.zeros_like(weights)
        positives = picks.positive.shape[1]
        labels[:, :positives] = 1
        if self.train_cfg['pos_weight'] > 0:
            weights[:, :positives] *= self.train_cfg['pos_weight']
        scores = _flatten(scores, 1)[..., 0].gather(1, picked)
        return self.loss_cls(
            scores.flatten(), labels.flatten(), weights.flatten(), avg_factor=avg_factor
        )

    def _box_loss(
        self,
        deltas: list[Tensor],
        picks: Picks,
        avg_factor: Tensor,
        anchors: Tensor,
        truths: Tensor,
        index: Tensor,
    ) -> Tensor:
        deltas = _rows(_flatten(deltas, 4), picks.positive).flatten(0, 1)
        if truths.shape[1] == 0:
            return deltas.sum() * 0
        truth = (index.gather(1, picks.positive) - 1).clamp(min=0)
        targets = self.bbox_coder.encode(
            anchors[picks.positive].flatten(0, 1), _rows(truths, truth).flatten(0, 1)
        )
        # Padding is its own target: no loss, no gradient, and the loss need not ask for weights.
        real = picks.is_positive.flatten()[:, None]
        targets = torch.where(real, targets, deltas.detach().float())
        return self.loss_bbox(deltas.float(), targets, avg_factor=avg_factor)

    def predict_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        score_factors: list[Tensor] | None = None,
        batch_img_metas: list[dict] | None = None,
        cfg: ConfigDict | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> list[InstanceData]:
        """Proposals of a batch; arguments and results as mmdet's.

        Where proposals are the results (`rescale`), or are suppressed in another way than plain
        NMS, mmdet's code runs.
        """
        cfg = self.test_cfg if cfg is None else cfg
        if rescale or not with_nms or cfg.nms.keys() != {'type', 'iou_threshold'}:
            return super().predict_by_feat(
                cls_scores, bbox_preds, score_factors, batch_img_metas, cfg, rescale, with_nms
            )
        with torch.no_grad():
            return self._propose(cls_scores, bbox_preds, batch_img_metas, cfg)

    def _propose(
        self, scores: list[Tensor], deltas: list[Tensor], metas: list[dict], cfg: ConfigDict
    ) -> list[InstanceData]:
        """The best boxes of each level, decoded; NMS in each; the best of what is left."""
        logits, boxes = self._best_of_levels(scores, deltas, cfg.get('nms_pre', -1))
        sizes = [(*meta['img_shape'][1::-1], *meta['img_shape'][1::-1]) for meta in metas]
        limits = torch.tensor(sizes, dtype=boxes.dtype).to(boxes.device, non_blocking=True)
        if self.bbox_coder.clip_border:
            boxes = torch.minimum(boxes.clamp(min=0), limits[:, None, None])
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = logits > -torch.inf
        if cfg.get('min_bbox_size', -1) >= 0:
            valid &= (sides > cfg.min_bbox_size).all(-1)
        batch, levels, count = valid.shape
        keep = suppress(boxes.flatten(0, 1), valid.flatten(0, 1), cfg.nms.iou_threshold)
        ranked = logits.masked_fill(~keep.view_as(logits), -torch.inf).flatten(1)
        best, picked = ranked.topk(min(cfg.max_per_img, levels * count), dim=1)
        boxes = _rows(boxes.flatten(1, 2), picked)
        counts = (best > -torch.inf).sum(1).tolist()  # waits for the device
        return [
            InstanceData(
                bboxes=boxes[i, :n],
                scores=best[i, :n].sigmoid(),
                labels=picked.new_zeros(n),
            )
            for i, n in enumerate(counts)
        ]

    def _best_of_levels(
        self, scores: list[Tensor], deltas: list[Tensor], nms_pre: int
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, L, K), best first and padded with -inf, and their boxes (B, L, K, 4)."""
        anchors = self._anchors_of(scores)[0]
        logits, offsets, priors = [], [], []
        start = 0
        for score, delta in zip(scores, deltas, strict=True):
            score = _flatten([score], 1)[..., 0].float()
            count = score.shape[1]
            best, picked = score.topk(min(nms_pre, count) if nms_pre > 0 else count, dim=1)
            logits.append(best)
            offsets.append(_rows(_flatten([delta], 4), picked).float())
            priors.append(anchors[picked + start])
            start += count
        boxes = self.bbox_coder.decode(
            torch.cat(priors, 1).flatten(0, 1), torch.cat(offsets, 1).flatten(0, 1)
        )
        counts = [part.shape[1] for part in logits]
        boxes = boxes.unflatten(0, (len(scores[0]), -1)).split(counts, 1)
        pad = [max(counts) - count for count in counts]
        fit = torch.nn.functional.pad
        logits = [fit(part, (0, p), value=-torch.inf) for part, p in zip(logits, pad, strict=True)]
        boxes = [fit(part, (0, 0, 0, p)) for part, p in zip(boxes, pad, strict=True)]
        return torch.stack(logits, 1), torch.stack(boxes, 1)

    def _anchors_of(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Anchors (A, 4) and the top left corners (A, 2) of their cells, pixels; of maps' sizes."""
        sizes = [tuple(m.shape[-2:]) for m in maps]
        key = (maps[0].device, *sizes)
        if key not in self._anchors:
            anchors = self.prior_generator.grid_priors(sizes, device=maps[0].device)
            self._anchors[key] = torch.cat(anchors), self._cells(sizes, maps[0].device)
            if len(self._anchors) > _CACHED_SIZES:
                self._anchors.popitem(last=False)
        self._anchors.move_to_end(key)
        return self._anchors[key]

    def _cells(self, sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
        cells = []
        for (height, width), stride in zip(sizes, self.prior_generator.strides, strict=True):
            x = torch.arange(width, device=device) * stride[0]
            y = torch.arange(height, device=device) * stride[1]
            grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)
            cells.append(grid.flatten(0, 1).repeat_interleave(self.num_base_priors, 0))
        return torch.cat(cells)

    @staticmethod
    def _inside(cells: Tensor, metas: list[dict]) -> Tensor:
        """Which anchors (B, A) lie on the image with its own padding, not the batch's."""
        sizes = torch.tensor([meta['pad_shape'][1::-1] for meta in metas])
        sizes = sizes.to(cells.device, non_blocking=True)
        return (cells < sizes[:, None]).all(-1)


def _flatten(maps: list[Tensor], channels: int) -> Tensor:
    """Maps (B, n * channels, H, W) of the levels as rows (B, A, channels) in the anchors' order."""
    rows = [m.permute(0, 2, 3, 1).reshape(len(m), -1, channels) for m in maps]
    return torch.cat(rows, 1) if len(rows) > 1 else rows[0]


def _rows(rows: Tensor, picked: Tensor) -> Tensor:
    """Rows (B, A, C) at positions (B, K), as (B, K, C)."""
    return rows.gather(1, picked[..., None].expand(-1, -1, rows.shape[2]))
