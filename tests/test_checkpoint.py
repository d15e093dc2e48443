"""Weights into backbones: what must fit, what is left out, and what a misfit is told."""

from pathlib import Path

import pytest
import timm
import torch
from mmengine.logging import MMLogger

from mmvig.checkpoint import fit_state_dict, guess_arch, load_pretrained
from mmvig.models import TimmViT, ViG, ViGH, ViTAdapter
from tests import parity
from tests.models.test_vig import SMALL, small_vig
from tests.models.test_vig_h import small_vig_h
from tests.models.test_vit_adapter import small_adapter


def save(content: object, folder: Path) -> str:
    file = str(folder / 'weights.pth')
    torch.save(content, file)
    return file


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ('stored', 'prefix'),
    [
        ('encoder.', 'encoder.'),
        ('encoder.', 'encoder'),
        ('backbone.', 'backbone.'),  # of a detector, as mmengine's users write it
        ('module.backbone.', 'backbone'),
        ('backbone.encoder.', 'encoder.'),
    ],
)
def test_own_prefix(stored: str, prefix: str, tmp_path: Path) -> None:
    source, target = small_vig(), small_vig()
    weights = {f'{stored}{k}': v for k, v in source.state_dict().items()}
    other = {f'{stored.partition(".")[0]}2.weight': torch.zeros(1)}
    load_pretrained(target, save(weights | other, tmp_path), prefix=prefix)
    assert same(source.state_dict(), target.state_dict())


def test_a_prefix_of_nothing(tmp_path: Path) -> None:
    file = save(small_vig().state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r'that start with encoder\.: pos_embed, .* more$'):
        load_pretrained(small_vig(), file, prefix='encoder')


def test_classifier_is_left_out_and_position_embedding_resized(tmp_path: Path) -> None:
    source = small_vig()
    target = small_vig(final_norm=False, pretrain_size=448)
    head = {'head.weight': torch.zeros(10, 32), 'head.bias': torch.zeros(10)}
    load_pretrained(target, save(source.state_dict() | head, tmp_path))
    assert torch.equal(target.blocks[1].mlp.gate_proj.weight, source.blocks[1].mlp.gate_proj.weight)
    assert target.pos_embed.shape == (1, 28 * 28, 32)
    assert 0.5 < target.pos_embed.std() / source.pos_embed.std() < 1.0


def test_classifier_into_an_adapter_keeps_the_adapter(tmp_path: Path) -> None:
    model = small_adapter()
    source = ViG(arch=dict(SMALL, embed_dims=48, num_heads=3, depth=4))
    adapter = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('trunk.')}
    load_pretrained(model, save(source.state_dict(), tmp_path))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in adapter.items())
    assert torch.equal(loaded['trunk.pos_embed'], source.pos_embed)


def test_fitting_is_pure() -> None:
    state = {'a': torch.zeros(2), 'head.weight': torch.zeros(3)}
    assert fit_state_dict(state, {'a': (2,)})[1:] == ([], ['head.weight'])
    assert list(state) == ['a', 'head.weight']


def other_depth() -> dict:
    return ViG(arch=dict(SMALL, depth=4)).state_dict()


def other_width() -> dict:
    return ViG(arch=dict(SMALL, embed_dims=48, num_heads=3)).state_dict()


def odd_shapes() -> dict:
    odd = {'pos_embed': torch.zeros(1, 0, 32), 'blocks.0.attn.gk_proj.0.weight': torch.zeros(())}
    return small_vig().state_dict() | odd


def half_an_adapter() -> dict:
    return {k: v for k, v in small_adapter().state_dict().items() if 'spm.fc' not in k}


@pytest.mark.parametrize(
    ('model', 'state', 'message'),
    [
        (
            small_vig,
            other_depth,
            r'does not fit ViG of 32 dims and 3 blocks: unexpected: blocks\.3\.attn_norm',
        ),
        (small_vig, other_width, r'wrong shape: pos_embed is \(1, 196, 48\), not \(1, 196, 32\)'),
        (small_vig, lambda: {'head.bias': torch.zeros(2)}, 'missing: pos_embed, .* and 4. more'),
        (
            small_vig,
            odd_shapes,
            r'wrong shape: pos_embed is \(1, 0, 32\), not \(1, 196, 32\), blocks',
        ),
        (
            small_adapter,
            half_an_adapter,
            r'ViG of 48 dims and 4 blocks in ViTAdapter: missing: spm\.fc1\.weight',
        ),
    ],
)
def test_misfits(model, state, message: str, tmp_path: Path) -> None:
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(target, save(state(), tmp_path))
    assert '\n' not in str(error.value)
    assert same(before, target.state_dict())


def test_unknown_init_cfg_key() -> None:
    model = small_vig(init_cfg=dict(type='Pretrained', checkpoint='w.pth', strict=False))
    with pytest.raises(ValueError, match=r"unknown keys \['strict'\]"):
        model.init_weights()


@parity.needs_parity
@pytest.mark.parametrize('family', ['vig', 'vig_h'])
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_official_names_fit_strictly_and_tell_their_arch(family: str, arch: str) -> None:
    with torch.device('meta'):
        official = {k: torch.empty(s) for k, s in parity.keys(f'{family}_{arch}').items()}
        own = (ViG if family == 'vig' else ViGH)(arch).state_dict()
    fitted = fit_state_dict(official, {k: tuple(v.shape) for k, v in own.items()})
    assert {k for k in own if k not in fitted.tensors} == {
        k for k in own if k.startswith('outnorm')
    }
    assert all(k.startswith(('head.', 'classifier.')) for k in fitted.left_out)
    assert not fitted.resized
    type_ = 'ViG' if family == 'vig' else 'ViGH'
    assert str(guess_arch({k: tuple(v.shape) for k, v in official.items()})) == f'{type_} {arch}'


def test_a_trunk_that_lacks_one_tensor_is_not_said_to_be_another(tmp_path: Path) -> None:
    state = ViG('tiny').state_dict()
    del state['blocks.0.attn.gk_proj.1.bias']
    adapter = ViTAdapter(trunk=dict(type='ViG', arch='tiny'))
    message = r'missing: trunk\.blocks\.0\.attn\.gk_proj\.1\.bias; all else fits$'
    with pytest.raises(ValueError, match=message):
        load_pretrained(adapter, save(state, tmp_path))


@parity.needs_parity
@pytest.mark.parametrize(
    ('of', 'into', 'message'),
    [
        ('vig_small', ViG, 'not fit ViG tiny: wrong shape: pos_embed .* looks like ViG small$'),
        ('vig_h_tiny', ViG, 'not fit ViG tiny: missing: .* it looks like ViGH tiny$'),
        ('vig_base', ViGH, 'not fit ViGH tiny: missing: .* it looks like ViG base$'),
        ('vig_h_small', ViGH, 'unexpected: layers.2.blocks.5.norm.weight.* like ViGH small$'),
        ('vig_tiny_adapter', ViG, 'unexpected: level_embed.* like ViG tiny in ViTAdapter$'),
    ],
)
def test_official_file_of_another_arch(of: str, into: type, message: str, tmp_path: Path) -> None:
    state = {k: torch.zeros(s) for k, s in parity.keys(of).items()}
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(into('tiny'), save(state, tmp_path))
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 500


def test_the_log_states_what_became_of_the_tensors(tmp_path: Path, monkeypatch) -> None:
    lines = []
    monkeypatch.setattr(MMLogger, 'info', lambda self, line: lines.append(line))
    model = ViG(arch=dict(SMALL, embed_dims=48, num_heads=3, depth=4), pretrain_size=64)
    state = model.state_dict() | {'head.weight': torch.zeros(2, 48), 'head.bias': torch.zeros(2)}
    load_pretrained(small_adapter(), save(state, tmp_path))
    (line,) = lines
    assert 'into ViG of 48 dims and 4 blocks in ViTAdapter, 1 of them resized' in line
    assert 'left out 3 (norm.weight, head.weight, head.bias)' in line
    assert f'loaded {len(model.state_dict()) - 1} tensors' in line
    adapter = [k for k in small_adapter().state_dict() if not k.startswith('trunk.')]
    assert f'{len(adapter)} stay as initialised' in line


def test_out_norms_of_vig_h_are_ours_alone(tmp_path: Path) -> None:
    source, target = small_vig_h(), small_vig_h(out_indices=(1, 2, 3))
    torch.nn.init.normal_(source.outnorm2.weight)
    load_pretrained(target, save(source.state_dict(), tmp_path))
    assert torch.equal(target.outnorm2.weight, source.outnorm2.weight)
    with pytest.raises(
        ValueError, match=r'missing: outnorm0\.weight, outnorm0\.bias; all else fits'
    ):
        load_pretrained(source, save(target.state_dict(), tmp_path))


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    state = small_vig().state_dict()
    state['blocks.1.attn.o_proj.weight'][3, 4] = float('nan')
    with pytest.raises(ValueError, match=r'holds NaN or infinity: blocks\.1\.attn\.o_proj\.weight'):
        load_pretrained(small_vig(), save(state, tmp_path))


def test_state_dicts_of_other_networks_are_none_of_ours(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert guess_arch({k: tuple(v.shape) for k, v in state.items()}) is None
    with pytest.raises(ValueError, match='unexpected: .* looks like none of the networks here'):
        load_pretrained(small_vig(), save(state, tmp_path))


def test_deit_is_told_and_leaves_out_its_class_token() -> None:
    with torch.device('meta'):
        deit = timm.create_model('deit_tiny_patch16_224').state_dict()
        own = TimmViT('tiny').state_dict()
    assert str(guess_arch({k: tuple(v.shape) for k, v in deit.items()})) == 'TimmViT tiny'
    fitted = fit_state_dict(deit, {k: tuple(v.shape) for k, v in own.items()})
    assert fitted.left_out == ['cls_token', 'head.weight', 'head.bias']
    assert set(fitted.tensors) == set(own)
