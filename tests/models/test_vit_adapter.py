"""ViTAdapter around ViG and timm's ViT: official numbers, shapes, gradients, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmvig.models import ViTAdapter
from tests import parity
from tests.models.test_vig import SMALL

CONFIGS = Path(__file__).parents[2] / 'configs'
STRIDES = (4, 8, 16, 32)
VIG = dict(type='ViG', arch=dict(SMALL, embed_dims=48, num_heads=3, depth=4))
VIT = dict(type='TimmViT', arch='tiny', window_size=2)


def small_adapter(**settings) -> ViTAdapter:
    """Four narrow blocks, one an interaction; nothing asleep that starts at 0."""
    defaults = dict(
        trunk=VIG, deform_num_heads=4, interaction_indexes=((0, 0), (1, 1), (2, 2), (3, 3))
    )
    model = ViTAdapter(**{**defaults, **settings})
    for param in model.parameters():
        if not param.any():
            nn.init.normal_(param, std=0.1)
    return model


def backbone_config(name: str, **init_cfg) -> dict:
    """`model.backbone` of one of the project's configs."""
    backbone = Config.fromfile(CONFIGS / f'{name}.py').model.backbone
    return dict(backbone, init_cfg=init_cfg) if init_cfg else backbone


@pytest.mark.parametrize(
    ('arch', 'count'), [('t', 8_079_536), ('s', 28_059_920), ('b', 101_933_024)]
)
@pytest.mark.parametrize('task', ['detection/vig_{}_maskrcnn', 'segmentation/vig_{}_upernet'])
def test_parameter_counts(task: str, arch: str, count: int) -> None:
    model = MODELS.build(backbone_config(task.format(arch)))
    assert sum(p.numel() for p in model.parameters()) == count


@parity.needs_parity
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_names_and_shapes_are_those_of_the_flat_layout(arch: str) -> None:
    model = MODELS.build(backbone_config(f'detection/vig_{arch[0]}_maskrcnn'))
    own = {k.removeprefix('trunk.'): list(v.shape) for k, v in model.state_dict().items()}
    assert own == parity.keys(f'vig_{arch}_adapter')


@parity.needs_parity
@pytest.mark.parametrize(
    ('form', 'config'), [('det', 'detection/vig_t_maskrcnn'), ('seg', 'segmentation/vig_t_upernet')]
)
def test_flat_weights_give_the_reference_maps(form: str, config: str, tmp_path) -> None:
    seeded = parity.seeded()
    file = str(tmp_path / 'flat.pth')
    weights = seeded.fill(parity.keys('vig_tiny_adapter'))
    torch.save({k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, file)
    model = MODELS.build(backbone_config(config, type='Pretrained', checkpoint=file))
    model.init_weights()
    with torch.no_grad():
        outs = model.eval()(seeded.image(2, 64, 96).float())
    reference = np.load(parity.FOLDER / f'vig_tiny_adapter_{form}_64x96.npz')
    for out, stride in zip(outs, STRIDES, strict=True):
        expected = torch.from_numpy(reference[f'stride{stride}'])
        assert (out - expected).norm() / expected.norm() < 5e-4, f'stride {stride}'


@pytest.mark.parametrize(('h', 'w'), [(32, 32), (64, 96), (50, 75)])
@pytest.mark.parametrize('trunk', [VIG, VIT], ids=['vig', 'vit'])
def test_four_maps_of_any_image(trunk: dict, h: int, w: int) -> None:
    indexes = (
        ((0, 0), (1, 1), (2, 2), (3, 3)) if trunk is VIG else ((0, 2), (3, 5), (6, 8), (9, 11))
    )
    model = small_adapter(trunk=trunk, interaction_indexes=indexes, token_maps='each').eval()
    outs = model(torch.randn(1, 3, h, w))
    dims = model.trunk.embed_dims
    assert [tuple(o.shape) for o in outs] == [(1, dims, -(-h // s), -(-w // s)) for s in STRIDES]


@pytest.mark.parametrize('token_maps', ['last', 'each'])
def test_every_parameter_has_a_gradient(token_maps: str) -> None:
    model = small_adapter(token_maps=token_maps)
    outs = model(torch.randn(2, 3, 64, 96))
    sum((o * torch.randn_like(o)).mean() for o in outs).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_detection_adds_the_last_tokens_and_segmentation_those_of_each_interaction() -> None:
    last, each = small_adapter().eval(), small_adapter(token_maps='each').eval()
    each.load_state_dict(last.state_dict())
    x = torch.randn(1, 3, 64, 96)
    differs = [not torch.allclose(a, b) for a, b in zip(last(x), each(x), strict=True)]
    assert differs == [True, True, True, False]


def test_unused_injectors_leave_the_trunk_as_it_is() -> None:
    """At gamma = 0 the tokens are the plain trunk's."""
    model = small_adapter().eval()
    for interaction in model.interactions:
        nn.init.zeros_(interaction.injector.gamma)
    x = torch.randn(1, 3, 64, 96)
    maps = []
    hook = model.trunk.blocks[-1].register_forward_hook(lambda *args: maps.append(args[-1]))
    model(x)
    hook.remove()
    tokens = model.trunk(x)[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(maps[0], tokens)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(deform_num_heads=5), r'embed_dims \* value_ratio \(48\) must be divisible by num_h'),
        (dict(interaction_indexes=((0, 2),)), 'must cover the 4 blocks of the trunk once each'),
        (dict(token_maps='all'), "token_maps must be 'last' or 'each', got 'all'"),
        (dict(trunk=dict(VIG, final_norm=True)), 'does not use the final norm'),
        (dict(trunk='ViG'), r"trunk must be a config such as dict\(.*, got 'ViG'"),
        (dict(trunk=dict(type='ViGH', arch='tiny')), 'ViGH is no plain trunk: .* needs no adapter'),
        (
            dict(interaction_indexes=((0, 1), (2, 3)), token_maps='each'),
            "token_maps='each' needs 4 interactions, got 2",
        ),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_adapter(**settings)


def test_wrong_images() -> None:
    with pytest.raises(ValueError, match=r'expected an image batch \(B, 3, H, W\), got \(1, 1,'):
        small_adapter()(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match='image of 8x64 pixels is smaller than one patch'):
        small_adapter()(torch.randn(1, 3, 8, 64))


def test_fewer_outputs_are_the_same_maps_and_train_every_parameter() -> None:
    full = small_adapter().eval()
    part = small_adapter(out_indices=(1, -1)).eval()
    missing, unexpected = part.load_state_dict(full.state_dict(), strict=False)
    left_out = {'up.weight', 'up.bias', 'spm.fc1.weight', 'spm.fc1.bias'}
    norms = {k for k in full.state_dict() if k.startswith(('norm1.', 'norm3.'))}
    assert (missing, set(unexpected)) == ([], left_out | norms)

    x = torch.randn(1, 3, 64, 96)
    expected, outs = full(x), part(x)
    assert len(outs) == 2
    for out, index in zip(outs, (1, 3), strict=True):
        torch.testing.assert_close(out, expected[index])
    sum(out.square().mean() for out in outs).backward()
    assert not [name for name, p in part.named_parameters() if p.grad is None]
