"""Simple feature pyramid: sizes, parameters, gradients, errors."""

import pytest
import torch
from mmengine.registry import MODELS

from mmvig.models import SimpleFeaturePyramid


@pytest.mark.parametrize('num_outs', [4, 6])
def test_outputs_double_and_halve_the_last_map(num_outs: int) -> None:
    neck = MODELS.build(
        dict(type='SimpleFeaturePyramid', in_channels=24, out_channels=16, num_outs=num_outs)
    )
    outs = neck((torch.randn(2, 8, 3, 3), torch.randn(2, 24, 5, 7)))
    sizes = [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2), (1, 1)]
    assert [tuple(out.shape) for out in outs] == [(2, 16, *size) for size in sizes[:num_outs]]


def test_every_parameter_is_trained() -> None:
    neck = SimpleFeaturePyramid(24, 16)
    sum(out.square().mean() for out in neck((torch.randn(1, 24, 6, 4),))).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in neck.parameters())


def test_each_pixel_sees_its_own_surroundings() -> None:
    """Strides line up: a change of one pixel of the trunk changes outputs around it alone."""
    neck = SimpleFeaturePyramid(24, 16)
    x = torch.randn(1, 24, 16, 16)
    changed = x.clone()
    changed[..., 12, 4] += 1
    for out, other in zip(neck((x,)), neck((changed,)), strict=True):
        rows, cols = (out != other).any(1)[0].nonzero().unbind(-1)
        scale = out.shape[-1] / 16
        assert (rows.float().add(0.5) / scale - 12.5).abs().max() * scale < 1.5 + scale
        assert (cols.float().add(0.5) / scale - 4.5).abs().max() * scale < 1.5 + scale


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(in_channels=30), r'in_channels \(30\) must be a multiple of 4'),
        (dict(in_channels=24, num_outs=3), r'num_outs \(3\) must be at least 4'),
    ],
)
def test_refuses_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(**settings)
