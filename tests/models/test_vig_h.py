"""ViG-H: official numbers, any size, frozen stages, recomputation, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

from mmvig.models import ViGH
from tests import parity

CONFIGS = Path(__file__).parents[2] / 'configs'
ARCHS = dict(t='tiny', s='small', b='base')
SMALL = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), mlp_dims=(8,) * 4
)
NEWER_TO_OLDER = {
    '.norm.': '.ln_1.',
    '.op.': '.self_attention.',
    'classifier.norm.': 'norm.',
    'classifier.head.': 'head.',
}


def small_vig_h(**settings) -> ViGH:
    """Five narrow blocks in four stages."""
    return ViGH(arch=SMALL, **settings)


@pytest.mark.parametrize(
    ('arch', 'with_classifier'),
    [('tiny', 28_600_680), ('small', 50_051_688), ('base', 88_904_360)],
)
def test_parameter_counts(arch: str, with_classifier: int) -> None:
    with torch.device('meta'):
        model = ViGH(arch)
    ours = sum(p.numel() for n, p in model.named_parameters() if not n.startswith('outnorm'))
    dims = model.embed_dims[-1]
    assert ours + 2 * dims + 1000 * dims + 1000 == with_classifier


def older_names(weights: dict) -> dict:
    """The names of older official files."""
    older = {}
    for name, tensor in weights.items():
        block = name.startswith('layers.')
        for new, old in NEWER_TO_OLDER.items():
            if block == new.startswith('.'):
                name = name.replace(new, old)
        older[name] = tensor
    return older


@parity.needs_parity
@pytest.mark.parametrize('names', ['newer', 'older'])
def test_official_weights_give_the_official_features_and_logits(names: str, tmp_path) -> None:
    seeded = parity.seeded()
    official = {k: v.float() for k, v in seeded.fill(parity.keys('vig_h_tiny')).items()}
    weights = older_names(official) if names == 'older' else official
    assert (names == 'older') == ('layers.0.blocks.0.ln_1.weight' in weights)
    torch.save({'model': weights}, tmp_path / 'vig_h_t.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'vig_h_t.pth'))
    model = MODELS.build(dict(type='ViGH', arch='tiny', init_cfg=init_cfg))
    model.init_weights()
    out_norms = {k: v.shape for k, v in model.state_dict().items() if k.startswith('outnorm')}
    model.load_state_dict(seeded.fill(out_norms), strict=False)

    image = seeded.image(2, 64, 96).float()
    expected = np.load(parity.FOLDER / 'vig_h_tiny_64x96.npz')
    with torch.no_grad():
        stages = model.eval()(image)
        model.outnorm3.weight.copy_(official['classifier.norm.weight'])
        model.outnorm3.bias.copy_(official['classifier.norm.bias'])
        pooled = model(image)[-1].mean((2, 3))
    logits = pooled @ official['classifier.head.weight'].T + official['classifier.head.bias']
    found = {f'stage{i}': stage for i, stage in enumerate(stages)} | {'logits': logits}
    assert set(found) == set(expected)
    for name, value in found.items():
        target = torch.from_numpy(expected[name])
        assert value.shape == target.shape
        assert (value - target).norm() / target.norm() < 2e-4, name


@pytest.mark.parametrize(('h', 'w'), [(4, 4), (64, 96), (50, 33), (224, 97)])
def test_any_image_size(h: int, w: int) -> None:
    outs = small_vig_h(out_indices=(0, 2, 3))(torch.randn(1, 3, h, w))
    expected = [(c, -(-h // s), -(-w // s)) for c, s in ((8, 4), (24, 16), (32, 32))]
    assert [tuple(o.shape[1:]) for o in outs] == expected


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3,), (1, 2)])
def test_every_trainable_parameter_has_a_gradient(out_indices: tuple[int, ...]) -> None:
    model = small_vig_h(out_indices=out_indices)
    outs = model(torch.randn(2, 3, 64, 96))
    # the mean square alone would not change with the input of a norm
    sum((o * torch.randn_like(o)).sum() for o in outs).backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trainable.items() if p.grad is None or not p.grad.any()]
    run = tuple(f'stages.{i}.' for i in range(out_indices[-1]))
    assert all(n in trainable for n, _ in model.named_parameters() if n.startswith(run))
    assert len(trainable) == len(list(model.parameters())) or out_indices[-1] < 3


def test_training_and_evaluation_compute_the_same_without_drop_path() -> None:
    model, x = small_vig_h(), torch.randn(2, 3, 48, 80)
    torch.testing.assert_close(model.train()(x), model.eval()(x))


def test_drop_path_rises_over_all_stages() -> None:
    model = small_vig_h(drop_path_rate=0.4)
    rates = [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ('frozen_stages', 'frozen'),
    [
        (-1, ()),
        (0, ('patch_embed.',)),
        (2, ('patch_embed.', 'stages.0.', 'stages.1.')),
        (4, ('patch_embed.', 'stages.')),
    ],
)
def test_frozen_stages_stay_as_they_are(frozen_stages: int, frozen: tuple[str, ...]) -> None:
    model = small_vig_h(frozen_stages=frozen_stages)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    outs = model.train()(torch.randn(2, 3, 48, 80))
    sum(o.pow(3).sum() for o in outs).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name
    training = [any(m.training for m in stage.modules()) for stage in model.stages]
    assert training == [f'stages.{i}.x'.startswith(frozen) is False for i in range(4)]


def test_layer_depths_cover_stem_blocks_and_norms() -> None:
    model = small_vig_h()
    depths = {n: model.get_layer_depth(f'backbone.{n}', 'backbone.') for n in model.state_dict()}
    assert {num for _, num in depths.values()} == {7}
    assert {n for n, (layer, _) in depths.items() if layer == 0} == {
        n for n in depths if n.startswith('patch_embed.')
    }
    assert depths['stages.0.blocks.0.mlp.gate_proj.weight'][0] == 1
    assert depths['stages.2.blocks.1.attn_norm.weight'][0] == 4
    assert depths['stages.2.downsample.conv.weight'][0] == 4
    assert depths['stages.3.blocks.0.attn_norm.weight'][0] == 5
    assert depths['outnorm0.weight'][0] == 6


def test_global_context_from_the_first_stage_on() -> None:
    """The first token of stride 4 depends on the last pixel, and the reverse."""
    model = small_vig_h(out_indices=(0,)).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double, requires_grad=True)
    (out,) = model(x)
    for here, far in ((0, -1), (-1, 0)):
        (grad,) = torch.autograd.grad(out[0, 0, here, here], x, retain_graph=True)
        assert grad[0, :, far, far].any()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(arch='large'), "unknown arch 'large': choose one of tiny, small, base"),
        (dict(arch=dict(SMALL, depths=(1, 1))), r"needs 4 values, one a stage, .*'depths': \(1, 1"),
        (dict(arch=dict(SMALL, num_heads=(3,) * 4)), r'embed_dims \(8\) must be divisible by'),
        (dict(arch=SMALL, out_indices=(1, 4)), r'out_indices \[4\] out of range: the 4 stages'),
        (dict(arch=SMALL, out_indices=()), 'name at least one'),
        (dict(arch=SMALL, frozen_stages=5), r'frozen_stages \(5\) must be from -1 to 4'),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViGH(**settings)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((1, 4, 32, 32), r'expected an image batch \(B, 3, H, W\), got \(1, 4, 32, 32\)'),
        ((1, 3, 3, 64), 'image of 3x64 pixels is smaller than one patch'),
    ],
)
def test_wrong_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_vig_h()(torch.randn(shape))


def config(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def peer(package: str, name: str) -> Config:
    """A Swin config that ships with mmdet or mmseg."""
    folder = Path(pytest.importorskip(package).__file__).parent
    return Config.fromfile(folder / '.mim' / 'configs' / 'swin' / f'{name}.py')


@pytest.mark.parametrize(('arch', 'drop_path'), [('t', 0.2), ('s', 0.2), ('b', 0.3)])
def test_detection_recipe_is_swin_s(arch: str, drop_path: float) -> None:
    ours = config(f'detection/vig_h_{arch}_maskrcnn')
    swin = peer('mmdet', 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco')
    assert ours.model.backbone.drop_path_rate == drop_path
    # the same steps, in fewer kernels
    assert ours.optim_wrapper.optimizer == dict(swin.optim_wrapper.optimizer, type='FusedAdamW')
    assert ours.optim_wrapper.paramwise_cfg.custom_keys == {'norm': dict(decay_mult=0.0)}
    assert ours.param_scheduler == swin.param_scheduler
    assert ours.train_cfg.max_epochs == swin.train_cfg.max_epochs
    assert ours.model.neck.in_channels == list(ViGH.arch_zoo[ARCHS[arch]]['embed_dims'])


@pytest.mark.parametrize('arch', ['t', 's', 'b'])
def test_segmentation_recipe_is_swin_s(arch: str) -> None:
    ours = config(f'segmentation/vig_h_{arch}_upernet')
    swin = peer('mmseg', 'swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512')
    assert ours.model.backbone.drop_path_rate == swin.model.backbone.drop_path_rate
    assert ours.optim_wrapper.optimizer == dict(swin.optim_wrapper.optimizer, type='FusedAdamW')
    assert ours.optim_wrapper.paramwise_cfg.custom_keys == {'norm': dict(decay_mult=0.0)}
    assert [dict(s) for s in ours.param_scheduler] == [dict(s) for s in swin.param_scheduler]
    assert ours.train_cfg.max_iters == swin.train_cfg.max_iters
    assert ours.model.test_cfg == swin.model.test_cfg
    dims = list(ViGH.arch_zoo[ARCHS[arch]]['embed_dims'])
    assert ours.model.decode_head.in_channels == dims
    assert ours.model.auxiliary_head.in_channels == dims[2]


def test_norms_have_no_weight_decay() -> None:
    optim = config('detection/vig_h_t_maskrcnn').optim_wrapper
    model = nn.Sequential(small_vig_h())
    groups = build_optim_wrapper(model, optim).optimizer.param_groups
    decays = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    for name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            is_norm = isinstance(module, nn.LayerNorm | nn.RMSNorm)
            assert decays[id(param)] == (0 if is_norm else 0.05), name
