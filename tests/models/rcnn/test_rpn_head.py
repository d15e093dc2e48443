"""Losses, gradients and proposals of the batched RPN head against mmdet's own."""

from collections.abc import Callable

import pytest
import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor

from .conftest import HEIGHT, STRIDES, WIDTH, metas, random_truths

SIZES = [(HEIGHT, WIDTH), (100, 130), (64, 190)]
CHANNELS = 64
# convolutions on a GPU sum in another order each time
TOLERANCE = dict(cpu=1e-5, cuda=1e-3)


def settings(cfg: ConfigDict) -> dict:
    """The RPN head's config; every anchor is sampled, so that nothing is random."""
    cfg.train_cfg.rpn.sampler.update(num=10**6, pos_fraction=1.0)
    return {**cfg.rpn_head, 'train_cfg': cfg.train_cfg.rpn, 'test_cfg': cfg.test_cfg.rpn}


def maps(batch: int) -> tuple[Tensor, ...]:
    sizes = [(-(-HEIGHT // s), -(-WIDTH // s)) for s in STRIDES]
    return tuple(torch.randn(batch, CHANNELS, *size) for size in sizes)


@pytest.mark.parametrize('counts', [(5, 1, 12), (3, 0, 2), (0, 0, 0)])
@pytest.mark.parametrize('pos_weight', [-1, 2.0])
def test_losses_and_gradients(
    pos_weight: float, counts: tuple[int, ...], cfg: ConfigDict, build_pair: Callable, device: str
) -> None:
    cfg.train_cfg.rpn.pos_weight = pos_weight
    heads = build_pair('BatchedRPNHead', 'RPNHead', settings(cfg))
    truths = [random_truths(count, num_classes=1).to(device) for count in counts]
    x = [m.to(device) for m in maps(len(counts))]
    results = []
    for head in heads:
        head.to(device)
        losses = head.loss_by_feat(*head(x), truths, metas(*SIZES))
        losses = [
            torch.stack(list(value)).sum() if isinstance(value, list) else value
            for value in losses.values()
        ]
        sum(losses).backward()
        results.append((losses, [p.grad for p in head.parameters()]))
    torch.testing.assert_close(*results, rtol=TOLERANCE[device], atol=1e-6)
    assert results[0][0][0] > 0 and (results[0][0][1] > 0) == any(counts)


@pytest.mark.parametrize('nms_pre', [300, 10**6, -1])
def test_proposals(nms_pre: int, cfg: ConfigDict, build_pair: Callable, device: str) -> None:
    heads = build_pair('BatchedRPNHead', 'RPNHead', settings(cfg))
    proposal_cfg = cfg.train_cfg.rpn_proposal
    proposal_cfg.update(nms_pre=nms_pre, max_per_img=100)
    x = maps(3)
    with torch.no_grad():
        scores, deltas = ([m.to(device) for m in part] for part in heads[0](x))
        ours, theirs = (
            head.predict_by_feat(scores, deltas, batch_img_metas=metas(*SIZES), cfg=proposal_cfg)
            for head in heads
        )
    for got, expected in zip(ours, theirs, strict=True):
        assert len(got) == len(expected) == 100
        torch.testing.assert_close(got.bboxes, expected.bboxes)
        torch.testing.assert_close(got.scores, expected.scores)
        assert torch.equal(got.labels, expected.labels)


def test_fewer_proposals_than_asked_for(cfg: ConfigDict, build_pair: Callable) -> None:
    """Boxes below the smallest size are dropped, and images may keep different numbers."""
    heads = build_pair('BatchedRPNHead', 'RPNHead', settings(cfg))
    proposal_cfg = cfg.train_cfg.rpn_proposal
    proposal_cfg.update(min_bbox_size=60, max_per_img=1000)
    x = maps(3)
    with torch.no_grad():
        ours, theirs = (
            head.predict_by_feat(*head(x), batch_img_metas=metas(*SIZES), cfg=proposal_cfg)
            for head in heads
        )
    counts = [len(got) for got in ours]
    assert counts == [len(expected) for expected in theirs] and len(set(counts)) > 1
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.bboxes, expected.bboxes)


def test_proposals_of_half_precision_maps_are_decoded_in_float32(
    cfg: ConfigDict, build_pair: Callable
) -> None:
    """mmdet rounds the anchors themselves; beyond 512 pixels that is up to 2 pixels a corner."""
    ours, theirs = build_pair('BatchedRPNHead', 'RPNHead', settings(cfg))
    width = 1344
    sizes = [(2, -(-width // s)) for s in STRIDES]
    scores = [torch.rand(1, 3, *size).bfloat16() for size in sizes]
    still = [torch.zeros(1, 12, *size, dtype=torch.bfloat16) for size in sizes]
    meta = [dict(img_shape=(10**4, 10**4), pad_shape=(32, width))]
    no_nms = Config(dict(nms_pre=-1, max_per_img=10**5, nms=dict(type='nms', iou_threshold=1.0)))
    anchors = torch.cat(ours.prior_generator.grid_priors(sizes, device='cpu')).clamp(min=0)

    def largest_error(head: torch.nn.Module) -> float:
        (found,) = head.predict_by_feat(scores, still, batch_img_metas=meta, cfg=no_nms)
        return torch.cdist(found.bboxes.float(), anchors, p=torch.inf).amin(1).max().item()

    assert largest_error(ours) < 1e-3
    assert largest_error(theirs) >= 2


def test_anchors_of_many_sizes_are_not_kept(cfg: ConfigDict, build_pair: Callable) -> None:
    head, _ = build_pair('BatchedRPNHead', 'RPNHead', settings(cfg))
    for width in range(1, 30):
        head._anchors_of([torch.zeros(1, 3, 2, width)] * len(STRIDES))
    assert len(head._anchors) == 8


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('sampler', dict(type='PseudoSampler'), 'RandomSampler, got PseudoSampler'),
        ('assigner.ignore_iof_thr', 0.5, 'ignore_iof_thr=-1'),
        ('assigner.gpu_assign_thr', 100, 'gpu_assign_thr=-1, got 100'),
        ('allowed_border', 0, 'allowed_border=-1, got 0'),
    ],
)
def test_settings_that_only_mmdets_head_has(
    path: str, value: object, message: str, cfg: ConfigDict, build_pair: Callable
) -> None:
    head = Config(settings(cfg))
    head.merge_from_dict({f'train_cfg.{path}': value})
    if path == 'sampler':
        head.train_cfg.sampler = value
    with pytest.raises(ValueError, match=message):
        build_pair('BatchedRPNHead', 'RPNHead', head._cfg_dict.to_dict())
