"""What training asks of every backbone: recomputation, frozen parts, distributed gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmvig.models import TimmViT
from tests.models.test_vig import small_vig
from tests.models.test_vig_h import small_vig_h
from tests.models.test_vit_adapter import VIG, VIT, small_adapter

Build = Callable[..., nn.Module]


def small_vit(**settings) -> TimmViT:
    """DeiT-T, half of its blocks in windows."""
    return TimmViT('tiny', window_size=2, global_every=2, **settings)


def adapter_around(trunk: dict, depth: int) -> Build:
    """The adapter whose `frozen_stages` are its trunk's, and whose `with_cp` is for both."""
    quarter = depth // 4
    interactions = [(i, i + quarter - 1) for i in range(0, depth, quarter)]

    def build(frozen_stages: int = -1, with_cp: bool = False) -> nn.Module:
        inner = dict(trunk, frozen_stages=frozen_stages, with_cp=with_cp)
        # Plain batch norm: the synchronized one needs a GPU in distributed training.
        return small_adapter(
            trunk=inner,
            interaction_indexes=interactions,
            with_cp=with_cp,
            norm_cfg=dict(type='BN'),
        )

    return build


# With the prefixes of what two frozen stages hold.
BACKBONES = {
    'ViG': (small_vig, ('pos_embed', 'patch_embed.', 'blocks.0.', 'blocks.1.')),
    'ViGH': (small_vig_h, ('patch_embed.', 'stages.0.', 'stages.1.')),
    'TimmViT': (small_vit, ('pos_embed', 'patch_embed.', 'blocks.0.', 'blocks.1.')),
    'ViTAdapter, ViG': (
        adapter_around(VIG, depth=4),
        ('trunk.pos_embed', 'trunk.patch_embed.', 'trunk.blocks.0.', 'trunk.blocks.1.'),
    ),
    'ViTAdapter, TimmViT': (
        adapter_around(VIT, depth=12),
        ('trunk.pos_embed', 'trunk.patch_embed.', 'trunk.blocks.0.', 'trunk.blocks.1.'),
    ),
}
EVERY = pytest.mark.parametrize('name', sorted(BACKBONES))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """A loss to which every channel of every map contributes."""
    return sum(o.pow(3).mean() for o in model(x))


@EVERY
def test_recomputation_gives_the_same_gradients(name: str) -> None:
    build, _ = BACKBONES[name]
    plain, recomputed = build(), build(with_cp=True)
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 96)
    for model in (plain, recomputed):
        loss(model, x).backward()
    grads = dict(recomputed.named_parameters())
    for key, param in plain.named_parameters():
        torch.testing.assert_close(grads[key].grad, param.grad, msg=key)


@EVERY
def test_frozen_stages_stay_bit_identical(name: str) -> None:
    build, frozen = BACKBONES[name]
    model = build(frozen_stages=2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, torch.randn(2, 3, 64, 96)).backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(frozen), key


@pytest.mark.filterwarnings('ignore:Grad strides')
@pytest.mark.parametrize('settings', [{}, dict(with_cp=True, frozen_stages=1)], ids=str)
@EVERY
def test_distributed_training_finds_every_gradient(
    name: str, settings: dict, tmp_path: Path
) -> None:
    """Without `find_unused_parameters`, which would cost a walk over the graph in every step."""
    build, _ = BACKBONES[name]
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(build(**settings))
        for _ in range(2):  # a parameter without gradient fails the second step
            loss(model, torch.randn(1, 3, 64, 96)).backward()
    finally:
        torch.distributed.destroy_process_group()
    without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
