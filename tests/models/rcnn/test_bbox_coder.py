"""The coder that does not wait against mmdet's: the same bits, and no copy to the device."""

import pytest
import torch
from torch import Tensor

from .conftest import random_boxes

SETTINGS = dict(target_means=[0.1, 0.0, -0.2, 0.0], target_stds=[0.1, 0.1, 0.2, 0.3])


def coders(**settings: object) -> list:
    from mmdet.registry import TASK_UTILS

    kinds = ('AsyncDeltaXYWHBBoxCoder', 'DeltaXYWHBBoxCoder')
    return [TASK_UTILS.build(dict(SETTINGS, type=kind, **settings)) for kind in kinds]


@pytest.mark.parametrize('count', [0, 1, 50])
def test_encode(count: int, device: str) -> None:
    boxes, truths = (random_boxes(count).to(device) for _ in range(2))
    ours, theirs = coders()
    assert torch.equal(ours.encode(boxes, truths), theirs.encode(boxes, truths))
    assert torch.equal(ours.encode(boxes.half(), truths), theirs.encode(boxes.half(), truths))


@pytest.mark.parametrize('classes', [1, 5])
@pytest.mark.parametrize('limits', [None, (100, 90)])
@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('count', [0, 50])
def test_decode(count: int, clip: bool, limits: tuple | None, classes: int, device: str) -> None:
    boxes = random_boxes(count).to(device)
    deltas = 8 * torch.randn(count, 4 * classes, device=device)
    ours, theirs = (coder.decode(boxes, deltas, limits) for coder in coders(clip_border=clip))
    assert torch.equal(ours, theirs)


def test_other_cases_are_mmdets() -> None:
    boxes, deltas = random_boxes(6), torch.randn(6, 4)
    batch = (boxes.view(2, 3, 4), deltas.view(2, 3, 4), [(90, 80), (70, 100)])
    ours, theirs = coders(add_ctr_clamp=True)
    assert torch.equal(ours.decode(boxes, 90 * deltas), theirs.decode(boxes, 90 * deltas))
    ours, theirs = coders()
    assert torch.equal(ours.decode(*batch), theirs.decode(*batch))


def test_gradients_after_inference() -> None:
    coder, boxes = coders()[0], random_boxes(6)
    with torch.inference_mode():
        coder.decode(boxes, torch.zeros(6, 4))
    deltas = torch.zeros(6, 4, requires_grad=True)
    coder.decode(boxes, deltas).sum().backward()
    assert deltas.grad.isfinite().all()


def test_numbers_of_boxes_that_differ_are_refused() -> None:
    coder = coders()[0]
    with pytest.raises(AssertionError):
        coder.decode(random_boxes(1), torch.zeros(6, 4))
    with pytest.raises(AssertionError):
        coder.encode(random_boxes(1), random_boxes(6))


def test_constants_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    coder, boxes = coders()[0], random_boxes(6)
    coder.decode(boxes, coder.encode(boxes, boxes))
    monkeypatch.setattr(Tensor, 'new_tensor', lambda *args: pytest.fail('a copy from the host'))
    assert torch.allclose(coder.decode(boxes, coder.encode(boxes, boxes)), boxes, atol=1e-3)
