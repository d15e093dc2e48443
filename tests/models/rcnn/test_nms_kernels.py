"""The suppression kernels against torchvision: on a GPU, and under Triton's interpreter."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from tests.kernels.interpreter import run_interpreted

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICES = ['cpu'] if INTERPRETED else [pytest.param('cuda', marks=pytest.mark.gpu)]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec('triton') is None, reason='triton is not installed'
)


def expected(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    keep = torch.zeros_like(valid)
    for group, rows in enumerate(valid):
        (index,) = rows.nonzero(as_tuple=True)
        scores = torch.arange(len(index), 0, -1.0)
        keep[group, index[nms(boxes[group, index], scores, threshold)]] = True
    return keep


def blobs(groups: int, count: int) -> Tensor:
    """Boxes on whole pixels, so that no rounding decides."""
    corner = torch.randint(0, 300, (groups, count, 2))
    return torch.cat([corner, corner + torch.randint(8, 200, (groups, count, 2))], -1).float()


def chain(groups: int, count: int) -> Tensor:
    """Each box overlaps the next: as many decisions in a row as there are boxes."""
    left = torch.arange(float(count)) * 4
    return torch.stack([left, left * 0, left + 10, left * 0 + 10], 1).repeat(groups, 1, 1)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('make', [blobs, chain])
@pytest.mark.parametrize('count', [1, 33, 100])
def test_greedy_nms(count: int, make: Callable[[int, int], Tensor], device: str) -> None:
    from mmvig.models.rcnn.nms_kernels import greedy_nms

    boxes, valid = make(3, count), torch.rand(3, count) < 0.9
    # An IoU of exactly 1 / 10 is above 0.1 in torchvision on a CPU, which compares in double.
    for threshold in (0.1234, 0.5):
        keep = greedy_nms(boxes.to(device), valid.to(device), threshold).cpu()
        assert torch.equal(keep, expected(boxes, valid, threshold))


if not INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(Path(__file__))
