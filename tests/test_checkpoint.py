"""Checkpoints: where the weights are found, what must fit, and what a misfit is told."""

from pathlib import Path

import pytest
import torch

from mmvig.checkpoint import find_state_dict, fit_state_dict, load_pretrained
from mmvig.models import ViG
from tests.models.test_vig import SMALL, small_vig
from tests.models.test_vit_adapter import small_adapter


def save(content: object, folder: Path) -> str:
    file = str(folder / 'weights.pth')
    torch.save(content, file)
    return file


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: weights,
        lambda weights: {'model': weights},
        lambda weights: {'model': {'a': torch.zeros(1)}, 'model_ema': weights, 'epoch': 3},
        lambda weights: {'state_dict': {f'backbone.{k}': v for k, v in weights.items()}},
        lambda weights: {'model': {f'module.{k}': v for k, v in weights.items()}},
    ],
    ids=['bare', 'model', 'model_ema first', 'detector', 'DistributedDataParallel'],
)
def test_where_weights_are_found(wrap, tmp_path: Path) -> None:
    source, target = small_vig(), small_vig()
    load_pretrained(target, save(wrap(source.state_dict()), tmp_path))
    assert same(source.state_dict(), target.state_dict())


def test_own_prefix(tmp_path: Path) -> None:
    source, target = small_vig(), small_vig()
    weights = {f'encoder.{k}': v for k, v in source.state_dict().items()}
    load_pretrained(target, save(weights | {'other': torch.zeros(1)}, tmp_path), prefix='encoder.')
    assert same(source.state_dict(), target.state_dict())


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
    assert list(fit_state_dict(state, {'a': (2,)})) == ['a']
    assert list(state) == ['a', 'head.weight']


def other_depth() -> dict:
    return ViG(arch=dict(SMALL, depth=4)).state_dict()


def other_width() -> dict:
    return ViG(arch=dict(SMALL, embed_dims=48, num_heads=3)).state_dict()


def half_an_adapter() -> dict:
    return {k: v for k, v in small_adapter().state_dict().items() if 'spm.fc' not in k}


@pytest.mark.parametrize(
    ('model', 'state', 'message'),
    [
        (small_vig, other_depth, r'does not fit ViG of 32 dims: unexpected: blocks\.3\.attn_norm'),
        (small_vig, other_width, r'wrong shape: pos_embed is \(1, 196, 48\), not \(1, 196, 32\)'),
        (small_vig, lambda: {'head.bias': torch.zeros(2)}, 'missing: pos_embed, .* and 4. more'),
        (
            small_adapter,
            half_an_adapter,
            r'ViG of 48 dims in ViTAdapter: missing: spm\.fc1\.weight',
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


def test_truncated_file(tmp_path: Path) -> None:
    file = save(small_vig().state_dict(), tmp_path)
    Path(file).write_bytes(Path(file).read_bytes()[:5000])
    with pytest.raises(ValueError, match='cannot be read as a checkpoint') as error:
        load_pretrained(small_vig(), file)
    assert '\n' not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='no checkpoint at .*none.pth'):
        load_pretrained(small_vig(), str(tmp_path / 'none.pth'))


class Bomb:
    """Would create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    file = save({'model': small_vig().state_dict(), 'config': Bomb(tmp_path / 'boom')}, tmp_path)
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        load_pretrained(small_vig(), file)
    assert not (tmp_path / 'boom').exists()


def test_no_weights_in_it() -> None:
    with pytest.raises(ValueError, match='w.pth holds no state dict'):
        find_state_dict({'epoch': 3}, 'w.pth')


def test_unknown_init_cfg_key() -> None:
    model = small_vig(init_cfg=dict(type='Pretrained', checkpoint='w.pth', strict=False))
    with pytest.raises(ValueError, match=r"unknown keys \['strict'\]"):
        model.init_weights()
