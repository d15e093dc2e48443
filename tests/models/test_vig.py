"""The ViG trunk: official numbers, any size, frozen parts, recomputation, errors."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS

from mmvig.models import ViG
from mmvig.models.layers.embed import resize_pos_embed
from tests import parity

SMALL = dict(embed_dims=32, depth=3, num_heads=2, mlp_dims=48, conv_act=True, out_act=False)


def small_vig(**settings) -> ViG:
    """Three narrow blocks."""
    return ViG(arch=SMALL, **settings)


@pytest.mark.parametrize(
    ('arch', 'with_head'), [('tiny', 5_834_536), ('small', 22_615_144), ('base', 89_022_184)]
)
def test_parameter_counts(arch: str, with_head: int) -> None:
    model = ViG(arch)
    head = 1000 * model.embed_dims + 1000
    assert sum(p.numel() for p in model.parameters()) + head == with_head


@parity.needs_parity
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_names_and_shapes_are_the_official_ones(arch: str) -> None:
    official = {k: v for k, v in parity.keys(f'vig_{arch}').items() if not k.startswith('head')}
    assert {k: list(v.shape) for k, v in ViG(arch).state_dict().items()} == official


@parity.needs_parity
def test_official_weights_give_the_official_features(tmp_path) -> None:
    seeded = parity.seeded()
    weights = {k: v.float() for k, v in seeded.fill(parity.keys('vig_tiny')).items()}
    torch.save({'model': weights}, tmp_path / 'vig_t.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'vig_t.pth'))
    cfg = dict(type='ViG', arch='tiny', out_indices=(11,), final_norm=True, init_cfg=init_cfg)
    model = MODELS.build(cfg)
    model.init_weights()
    with torch.no_grad():
        (features,) = model.eval()(seeded.image(2, 64, 96).float())
    expected = torch.from_numpy(np.load(parity.FOLDER / 'vig_tiny_64x96.npz')['features'])
    assert features.shape == (2, 192, 4, 6)
    assert (features - expected).norm() / expected.norm() < 2e-4


@pytest.mark.parametrize(('h', 'w'), [(16, 16), (48, 80), (50, 33), (224, 224)])
def test_any_image_size(h: int, w: int) -> None:
    outs = small_vig(out_indices=(0, 2))(torch.randn(1, 3, h, w))
    assert [tuple(o.shape) for o in outs] == [(1, 32, -(-h // 16), -(-w // 16))] * 2


def test_every_parameter_has_a_gradient() -> None:
    model = small_vig()
    model(torch.randn(2, 3, 48, 80))[0].square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_training_and_evaluation_compute_the_same_without_drop_path() -> None:
    model, x = small_vig(), torch.randn(2, 3, 48, 80)
    torch.testing.assert_close(model.train()(x)[0], model.eval()(x)[0])


def test_drop_path_drops_in_training_only() -> None:
    model, x = small_vig(drop_path_rate=0.9), torch.randn(2, 3, 48, 80)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    torch.testing.assert_close(model(x)[0], model(x)[0])


def test_frozen_stages_stay_as_they_are() -> None:
    model = small_vig(frozen_stages=1, drop_path_rate=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(torch.randn(2, 3, 48, 80))[0].square().mean().backward()
    optimizer.step()
    frozen = ('pos_embed', 'patch_embed', 'blocks.0.')
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name
    assert not model.blocks[0].training
    assert model.blocks[1].training


def test_position_embedding_is_resized_once_per_size_and_follows_the_weights() -> None:
    model, x = small_vig().eval(), torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        first = model(x)[0]
        cached = model._resize_pos_embed(model.pos_embed, (3, 5))
        assert model._resize_pos_embed(model.pos_embed, (3, 5)) is cached
        model.pos_embed.add_(1)
        assert not torch.equal(model(x)[0], first)


def test_global_context() -> None:
    """The first token depends on the last one and the reverse: both directions are there."""
    model = small_vig().double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double, requires_grad=True)
    (out,) = model(x)
    for here, far in ((0, -1), (-1, 0)):
        (grad,) = torch.autograd.grad(out[0, :, here, here].sum(), x, retain_graph=True)
        assert grad[0, :, far, far].any()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(arch='huge'), "unknown arch 'huge': choose one of tiny, small, base"),
        (dict(arch=dict(SMALL, num_heads=5)), r'embed_dims \(32\) must be divisible by 2 \* num_h'),
        (dict(arch=dict(embed_dims=32)), r"exactly the keys .* got \['embed_dims'\]"),
        (dict(arch='tiny', out_indices=(3, 12)), r'out_indices \[12\] out of range: the 12 blocks'),
        (dict(arch='tiny', out_indices=(3, 2)), 'must ascend'),
        (dict(arch=SMALL, frozen_stages=4), r'frozen_stages \(4\) must be from -1 to 3'),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViG(**settings)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((1, 4, 32, 32), r'expected an image batch \(B, 3, H, W\), got \(1, 4, 32, 32\)'),
        ((3, 32, 32), r'expected an image batch \(B, 3, H, W\), got \(3, 32, 32\)'),
        ((1, 3, 15, 64), 'image of 15x64 pixels is smaller than one patch'),
    ],
)
def test_wrong_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_vig()(torch.randn(shape))


def test_images_are_floating_point() -> None:
    with pytest.raises(ValueError, match=r'expected images in a floating dtype, got torch.uint8'):
        small_vig()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(out_indices=3), r'out_indices must be a tuple such as \(0, 11\), got 3'),
        (dict(out_indices='last'), "got 'last'"),
    ],
)
def test_indices_are_a_sequence(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViG('tiny', **settings)


@pytest.mark.parametrize('rate', [-0.1, 1.0, 1.5])
def test_drop_path_is_a_probability(rate: float) -> None:
    with pytest.raises(ValueError, match=f'drop_path_rate must be at least 0 .* got {rate}'):
        ViG('tiny', drop_path_rate=rate)


def test_init_cfg_is_a_dict() -> None:
    with pytest.raises(ValueError, match=r"checkpoint='vig_t.pth'\), got the file alone"):
        ViG('tiny', init_cfg='vig_t.pth').init_weights()


def test_position_embedding_is_resized_alike_in_training() -> None:
    embed = torch.randn(1, 14 * 14, 6)
    with torch.no_grad():
        expected = resize_pos_embed(embed, (50, 84))
    trained = embed.clone().requires_grad_()
    actual = resize_pos_embed(trained, (50, 84))
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(actual, trained, weights)
    maps = embed.view(1, 14, 14, 6).permute(0, 3, 1, 2).requires_grad_()
    resized = torch.nn.functional.interpolate(maps, (50, 84), mode='bicubic')
    weights = weights.view(1, 50, 84, 6).permute(0, 3, 1, 2)
    (expected,) = torch.autograd.grad(resized, maps, weights)
    torch.testing.assert_close(grad, expected.flatten(2).mT)
