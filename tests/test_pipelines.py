"""ViG inside every OpenMMLab library: where the types are found, and what classifiers return."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

import mmvig  # noqa: F401
from mmvig.checkpoint import find_state_dict, read_checkpoint
from tests import parity

ROOT = Path(__file__).parents[1]
DETECTOR = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
TYPES = ('ViG', 'ViGH', 'TimmViT', 'ViTAdapter', 'SimpleFeaturePyramid')


@pytest.mark.parametrize('library', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_types_are_found_from_every_library(library: str) -> None:
    pytest.importorskip(library)
    registry = importlib.import_module(f'{library}.registry').MODELS
    assert all(registry.get(name) is MODELS.get(name) for name in TYPES)


def documented_configs() -> list[str]:
    """The configs that README.md and docs/pipelines.md begin with; README's has mmdet's base."""
    found = []
    for page in ('README.md', 'docs/pipelines.md'):
        found += re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)
    configs = [code for code in found if 'custom_imports' in code and 'backbone=' in code]
    return [code if '_base_' in code else f'_base_ = {DETECTOR!r}\n{code}' for code in configs]


def test_documented_configs_train(tmp_path: Path) -> None:
    """As they stand: a step of the models, and every parameter has a gradient."""
    mmdet, mmseg = pytest.importorskip('mmdet'), pytest.importorskip('mmseg')
    configs = documented_configs()
    assert len(configs) >= 3
    assert any('decode_head' in code for code in configs)
    folder = Path(mmseg.__path__[0], '.mim', 'configs', 'upernet')
    for number, code in enumerate(configs):
        is_detector = 'decode_head' not in code
        code = code.replace("_base_ = 'upernet", f"_base_ = '{folder}/upernet")
        file = tmp_path / f'config_{number}.py'
        file.write_text(code)
        cfg = Config.fromfile(file)
        init_default_scope('mmdet' if is_detector else 'mmseg')
        library = mmdet if is_detector else mmseg
        models = importlib.import_module(f'{library.__name__}.registry').MODELS
        model = revert_sync_batchnorm(models.build(cfg.model)).train()
        outs = model.extract_feat(torch.randn(2, 3, 64, 64))
        if not is_detector:
            heads = (model.decode_head, model.auxiliary_head)
            outs = [head(outs) for head in heads]
        sum(out.square().mean() for out in outs).backward()
        parts = ['backbone', 'neck'] if is_detector else ['backbone', 'decode_head']
        for name, param in model.named_parameters():
            if name.startswith(tuple(parts)):
                assert param.grad is not None, (number, name)


@parity.needs_parity
def test_mmpretrains_classifier_returns_the_official_logits(tmp_path) -> None:
    pytest.importorskip('mmpretrain', reason='mmpretrain is not among the test requirements')
    from mmpretrain.registry import MODELS

    seeded = parity.seeded()
    file = tmp_path / 'vig_t.pth'
    torch.save({'model': seeded.fill(parity.keys('vig_tiny'))}, file)
    classifier = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='ViG', arch='tiny', init_cfg=dict(type='Pretrained', checkpoint=str(file))
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=1000, in_channels=192),
        )
    )
    classifier.init_weights()
    official = find_state_dict(read_checkpoint(str(file)))
    classifier.head.fc.load_state_dict(
        {name: official[f'head.{name}'].float() for name in ('weight', 'bias')}
    )
    with torch.no_grad():
        logits = classifier.eval()(seeded.image(2, 64, 96).float(), mode='tensor')
    expected = torch.from_numpy(np.load(parity.FOLDER / 'vig_tiny_64x96.npz')['logits'])
    assert (logits - expected).norm() < 2e-4 * expected.norm()
