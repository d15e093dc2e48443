"""Which ground truth each box belongs to, and which boxes are trained on, for a whole batch.

mmdet's `MaxIoUAssigner` and `RandomSampler` go image by image, the former ground truth by ground
truth, and ask the device for a decision each time. These do the same without asking.

Shape legend: B images, N boxes of an image, G ground truths of an image, both padded.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmvig.models.rcnn.boxes import CHUNK_ELEMENTS, pairwise_iou


class Assignment(NamedTuple):
    """What each of the boxes (B, N) is to learn."""

    index: Tensor  # int64: 1 + its ground truth; 0 for background, -1 for neither
    iou: Tensor  # with the ground truth that it overlaps most


class Picks(NamedTuple):
    """Boxes drawn for training, as positions among the N of their image."""

    positive: Tensor  # (B, P), int64
    is_positive: Tensor  # (B, P), bool: the others pad
    negative: Tensor  # (B, K), int64
    is_negative: Tensor  # (B, K), bool


@dataclass(frozen=True)
class MaxIoURule:
    """The settings of an mmdet `MaxIoUAssigner`; the names are its own."""

    pos_iou_thr: float
    neg_iou_thr: float
    min_pos_iou: float
    match_low_quality: bool

    @classmethod
    def of(cls, assigner: Any) -> 'MaxIoURule':
        """Reads the settings of a built assigner.

        Raises:
            ValueError: If it is another one, or has settings that are not known here.
        """
        _require(
            assigner,
            'MaxIoUAssigner',
            dict(gt_max_assign_all=True, perm_repeat_gt_cfg=None, gpu_assign_thr=-1),
        )
        if assigner.ignore_iof_thr > 0 or not isinstance(assigner.neg_iou_thr, float):
            raise ValueError(
                'batched assignment takes ignore_iof_thr=-1 and one neg_iou_thr, got '
                f'{assigner.ignore_iof_thr} and {assigner.neg_iou_thr}; use the head of mmdet'
            )
        return cls(**{name: getattr(assigner, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class RandomRule:
    """The settings of an mmdet `RandomSampler`; the names are its own."""

    num: int
    pos_fraction: float
    neg_pos_ub: float
    add_gt_as_proposals: bool

    @classmethod
    def of(cls, sampler: Any) -> 'RandomRule':
        """Reads the settings of a built sampler.

        Raises:
            ValueError: If it is another one.
        """
        _require(sampler, 'RandomSampler', {})
        return cls(**{name: getattr(sampler, name) for name in cls.__dataclass_fields__})


def assign(boxes: Tensor, truths: Tensor, is_truth: Tensor, rule: MaxIoURule) -> Assignment:
    """Assigns every box to the ground truth that it overlaps most, or to the background.

    Args:
        boxes: (B, N, 4), or (1, N, 4) for the same boxes in every image. One without area
            overlaps nothing.
        truths: (B, G, 4).
        is_truth: (B, G), bool; the others pad.
        rule: Thresholds. With `match_low_quality`, the boxes that overlap a ground truth most
            belong to it wherever that overlap reaches `min_pos_iou`; the last one wins.
    """
    batch, num_truths = is_truth.shape
    best = boxes.new_zeros(batch, boxes.shape[1])
    index = torch.zeros_like(best, dtype=torch.long)
    forced = torch.zeros_like(index)
    step = max(1, CHUNK_ELEMENTS // max(1, best.numel()))
    for start in range(0, num_truths, step):
        part = slice(start, start + step)
        number = torch.arange(start + 1, min(start + step, num_truths) + 1, device=boxes.device)
        ious = pairwise_iou(truths[:, part], boxes)
        ious.masked_fill_(~is_truth[:, part, None], 0)
        value, which = ious.max(1)
        index = torch.where(value > best, which + start + 1, index)
        best = torch.maximum(value, best)
        if rule.match_low_quality:
            most = ious.amax(2, keepdim=True)
            wins = is_truth[:, part, None] & (most >= rule.min_pos_iou) & (ious == most)
            claims = torch.where(wins, number[:, None].to(torch.int32), 0).amax(1)
            forced = torch.where(claims > 0, claims.long(), forced)
    index = torch.where(best >= rule.pos_iou_thr, index, -1)
    index = torch.where(best < rule.neg_iou_thr, 0, index)
    return Assignment(torch.where(forced > 0, forced, index), best)


def draw(index: Tensor, rule: RandomRule) -> Picks:
    """Draws boxes at random, without replacement: at most a share of positives, the rest negatives.

    Args:
        index: (B, N), as `Assignment.index`.
        rule: How many.
    """
    keys = torch.rand(index.shape, device=index.device)
    positive, is_positive = _draw(keys, index > 0, int(rule.num * rule.pos_fraction))
    negative, is_negative = _draw(keys, index == 0, rule.num)
    count = is_positive.sum(1, keepdim=True)
    room = rule.num - count
    if rule.neg_pos_ub >= 0:
        room = torch.minimum(room, (rule.neg_pos_ub * count.clamp(min=1)).long())
    is_negative &= torch.arange(negative.shape[1], device=index.device) < room
    return Picks(positive, is_positive, negative, is_negative)


def _draw(keys: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The candidates with the largest keys, (B, count) at most, and which are candidates."""
    value, position = keys.masked_fill(~candidates, -1).topk(min(count, keys.shape[1]), dim=1)
    return position, value >= 0


def _require(part: Any, kind: str, settings: dict[str, object]) -> None:
    if type(part).__name__ != kind:
        raise ValueError(f'batched heads work with a {kind}, got {type(part).__name__}')
    for name, expected in settings.items():
        if getattr(part, name) != expected:
            raise ValueError(
                f'batched heads take {kind} with {name}={expected}, got {getattr(part, name)}; '
                'use the head of mmdet'
            )
