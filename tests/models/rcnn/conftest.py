"""Boxes, truths and heads that mmdet's code and ours are compared on."""

from collections.abc import Callable, Iterator

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn

import mmvig  # noqa: F401

pytest.importorskip('mmdet', reason='mmdet is not installed')

HEIGHT, WIDTH = 128, 192
STRIDES = (4, 8, 16, 32, 64)


def random_boxes(count: int, low: int = 8, high: int = 64) -> Tensor:
    """Boxes on whole pixels: exact also with the offsets that mmdet's NMS adds."""
    sides = torch.randint(low, high, (count, 2))
    limits = torch.tensor([WIDTH, HEIGHT]) - sides
    corner = (torch.rand(count, 2) * limits).round()
    return torch.cat([corner, corner + sides], 1)


def random_truths(count: int, num_classes: int = 3) -> InstanceData:
    return InstanceData(bboxes=random_boxes(count), labels=torch.randint(0, num_classes, (count,)))


def metas(*sizes: tuple[int, int]) -> list[dict]:
    """Images of these heights and widths, padded to a multiple of 32 and then to the largest."""
    padded = [tuple(-(-side // 32) * 32 for side in size) for size in sizes]
    return [
        dict(img_shape=size, pad_shape=pad, batch_input_shape=(HEIGHT, WIDTH), scale_factor=(1, 1))
        for size, pad in zip(sizes, padded, strict=True)
    ]


@pytest.fixture
def cfg() -> ConfigDict:
    """The model of the shapes config."""
    from tests.test_configs import ROOT

    return Config.fromfile(ROOT / 'detection' / 'vig_t_maskrcnn_shapes.py').model


@pytest.fixture
def build_pair() -> Callable[..., tuple[nn.Module, nn.Module]]:
    """Builds a module and mmdet's counterpart, with the same weights."""

    def build(
        ours: str, theirs: str, settings: dict, their_settings: dict | None = None
    ) -> tuple[nn.Module, nn.Module]:
        from mmdet.registry import MODELS

        kinds = ((ours, settings), (theirs, their_settings or settings))
        pair = [MODELS.build({**own, 'type': kind}) for kind, own in kinds]
        pair[0].load_state_dict(pair[1].state_dict())
        return tuple(pair)

    return build


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def float32_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convs on a GPU round to TF32 by default, which makes small gradients differ."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture(autouse=True)
def mmdet_scope() -> Iterator[None]:
    """mmdet's types are found by their bare names, whatever config a test before has loaded."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield
