"""Channels of backbones, and those that necks and heads take."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmvig.engine import check_channels
from tests.models.test_vig import small_vig
from tests.models.test_vig_h import small_vig_h
from tests.models.test_vit_adapter import small_adapter


@pytest.mark.parametrize('build', [small_vig, small_vig_h, small_adapter])
@torch.no_grad()
def test_backbones_know_their_channels(build) -> None:
    backbone = build().eval()
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert backbone.out_channels == tuple(m.shape[1] for m in maps)


def model(**parts: object) -> SimpleNamespace:
    """Backbone of four maps, beside other parts."""
    return SimpleNamespace(backbone=SimpleNamespace(out_channels=(8, 16, 32, 64)), **parts)


def reader(in_channels: object, in_index: object = None) -> SimpleNamespace:
    return SimpleNamespace(in_channels=in_channels, in_index=in_index)


def test_what_fits() -> None:
    check_channels(SimpleNamespace(backbone=nn.Identity()))
    check_channels(nn.Linear(3, 4))
    check_channels(model(neck=reader((8, 16, 32, 64))))
    check_channels(model(neck=reader(64)))
    check_channels(model(neck=SimpleNamespace(), decode_head=reader(5, 0)))
    check_channels(model(decode_head=reader([16, 64], [1, -1]), auxiliary_head=reader(32, 2)))
    check_channels(model(decode_head=reader(120, [0, 1, 2, 3])))  # their sum, by resize_concat


@pytest.mark.parametrize(
    ('parts', 'message'),
    [
        (
            dict(neck=reader([256, 512, 1024, 2048])),
            r'neck.in_channels is \[256, .*, but the 4 maps .* set neck=dict\(in_channels=\[8, 16',
        ),
        (dict(neck=reader([8, 16, 32])), r'have \[8, 16, 32, 64\] channels'),
        (dict(neck=reader(32)), r'neck.in_channels is 32, .* have 64 channels'),
        (dict(decode_head=reader([8, 16], [0, 2])), r'decode_head.* set decode_head=dict\(in_c'),
        (dict(decode_head=reader(8, 0), auxiliary_head=reader(8, 1)), 'auxiliary_head.in_channels'),
    ],
)
def test_what_does_not_fit(parts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_channels(model(**parts))


def test_a_neck_of_mmdet() -> None:
    pytest.importorskip('mmdet.models')
    neck = MODELS.build(dict(type='mmdet.FPN', in_channels=[256, 512], out_channels=8, num_outs=2))
    with pytest.raises(ValueError, match=r'neck.in_channels is \[256, 512\]'):
        check_channels(model(neck=neck))
