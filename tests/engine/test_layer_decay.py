"""Layer-wise learning-rate decay: every parameter once, the right rates, clear errors."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from tests.models.test_vig import small_vig
from tests.models.test_vit_adapter import small_adapter


class Detector(nn.Module):
    """A backbone and something behind it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(48, 2)


def build(model: nn.Module, **paramwise_cfg) -> torch.optim.Optimizer:
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
        constructor='LayerDecayOptimWrapperConstructor',
        paramwise_cfg=paramwise_cfg,
    )
    return build_optim_wrapper(model, cfg).optimizer


def test_rates_and_weight_decay() -> None:
    model = Detector(small_adapter())
    groups = build(model, layer_decay_rate=0.5).param_groups
    settings = {
        name: (group['lr'], group['weight_decay'])
        for group in groups
        for name in group['param_names']
    }
    assert set(settings) == {name for name, _ in model.named_parameters()}
    # 4 blocks: embeddings are layer 0, blocks layers 1 to 4, everything else layer 5
    assert settings['backbone.trunk.pos_embed'] == (0.5**5, 0.0)
    assert settings['backbone.trunk.patch_embed.proj.0.weight'] == (0.5**5, 0.05)
    assert settings['backbone.trunk.blocks.0.attn.o_proj.weight'] == (0.5**4, 0.05)
    assert settings['backbone.trunk.blocks.3.attn_norm.weight'] == (0.5, 0.0)
    assert settings['backbone.spm.fc1.weight'] == (1.0, 0.05)
    assert settings['backbone.level_embed'] == (1.0, 0.0)
    assert settings['backbone.interactions.0.injector.gamma'] == (1.0, 0.0)
    assert settings['head.weight'] == (1.0, 0.05)
    assert settings['head.bias'] == (1.0, 0.0)


def test_frozen_parameters_are_left_out() -> None:
    model = Detector(small_vig(frozen_stages=2))
    named = {n for g in build(model, layer_decay_rate=0.9).param_groups for n in g['param_names']}
    assert named == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ('model', 'paramwise_cfg', 'message'),
    [
        (small_vig, dict(num_layers=12), r"got the keys \['num_layers'\]"),
        (small_vig, dict(layer_decay_rate=1.5), 'above 0 and at most 1, got 1.5'),
        (lambda: nn.Linear(1, 1), dict(layer_decay_rate=0.9), 'Detector with backbone Linear'),
    ],
)
def test_errors(model, paramwise_cfg: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Detector(model()), **paramwise_cfg)
