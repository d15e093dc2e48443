"""ViG inside every OpenMMLab library: where the types are found, and what classifiers return."""

import importlib

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS

import mmvig  # noqa: F401
from mmvig.checkpoint import find_state_dict, read_checkpoint
from tests import parity

TYPES = ('ViG', 'ViGH', 'TimmViT', 'ViTAdapter', 'SimpleFeaturePyramid')


@pytest.mark.parametrize('library', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_types_are_found_from_every_library(library: str) -> None:
    pytest.importorskip(library)
    registry = importlib.import_module(f'{library}.registry').MODELS
    assert all(registry.get(name) is MODELS.get(name) for name in TYPES)


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
