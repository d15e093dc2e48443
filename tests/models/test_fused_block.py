"""The fused form of ViG's block: when it is taken, and that it computes what the modules do."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmvig.models.backbones.vig import ViGBlock
from mmvig.models.layers import block as fused
from mmvig.models.layers.linear import Linear
from tests.kernels.interpreter import run_interpreted


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs Triton')
def test_fused_form_under_the_interpreter() -> None:
    """Runs `test_fused_block_kernels.py` in a process where Triton is not yet imported."""
    run_interpreted(Path(__file__).with_name('test_fused_block_kernels.py'))


def make_block() -> ViGBlock:
    return ViGBlock(32, 2, 48, conv_act=True)


def names_by_weights(block: nn.Module) -> list[str | None]:
    names = {id(p): name for name, p in block.named_parameters()}
    return [None if w is None else names[id(w)] for w in fused.read_weights(block)]


def test_reads_every_weight_once() -> None:
    names = [name for name in names_by_weights(make_block()) if name]
    assert sorted(names) == sorted(name for name, _ in make_block().named_parameters())


class Adapted(Linear):
    """A linear that somebody has changed."""


def swap_linear(block: ViGBlock) -> None:
    block.mlp.down_proj = Adapted(48, 32, bias=False)


def compute_weight(block: ViGBlock) -> None:
    nn.utils.parametrizations.weight_norm(block.attn.o_proj)


@pytest.mark.parametrize(
    'change',
    [
        swap_linear,
        compute_weight,
        lambda block: block.attn.register_forward_hook(lambda *args: None),
        lambda block: block.mlp.gate_proj.register_forward_pre_hook(lambda *args: None),
    ],
)
def test_changed_blocks_run_their_modules(change) -> None:
    block = make_block()
    change(block)
    assert fused.read_weights(block) is None


def test_modules_run_on_the_cpu_and_for_ablations() -> None:
    x = torch.randn(1, 4, 32)
    assert fused.FusedForm()(make_block(), x, None, None, None, (2, 2)) is None
    assert fused.read_weights(ViGBlock(32, 2, 48, scan='causal')) is None


def test_chain_is_a_row_of_blocks() -> None:
    first, second, x = make_block(), make_block(), torch.randn(2, 6, 32)
    chained = second.run(*first.run(x, None, None, (2, 3)), (2, 3))
    torch.testing.assert_close(chained[0] + chained[1], second(first(x, (2, 3)), (2, 3)))


def test_drop_path_in_a_chain() -> None:
    block = ViGBlock(32, 2, 48, drop_path=0.5).train()
    with torch.no_grad():
        x = torch.randn(64, 4, 32)
        _, _, keep = block.run(x, None, None, (2, 2))
        assert set(keep.tolist()) == {0.0, 2.0}
        y = block(x, (2, 2))
    skipped = (y == x).flatten(1).all(1).float().mean()
    assert 0.1 < skipped < 0.45  # both branches: a quarter


def test_copies_and_files_hold_no_cast_weights() -> None:
    block = make_block()
    block._fused._kept._made[torch.bfloat16] = (torch.ones(1),)
    assert not copy.deepcopy(block)._fused._kept._made
    assert not pickle.loads(pickle.dumps(block._fused))._kept._made
    assert not [k for k in block.state_dict() if 'fused' in k]


@pytest.mark.gpu
@pytest.mark.parametrize('arch', ['rms', 'layer'])
def test_half_precision_on_a_gpu(arch: str) -> None:
    norm = {} if arch == 'rms' else {'norm_layer': lambda c: fused.LayerNorm(c, eps=1e-5)}
    block = ViGBlock(192, 3, 512, conv_act=True, out_act=True, **norm).cuda()
    x = torch.randn(2, 300, 192, device='cuda')
    expected = step(copy.deepcopy(block).double(), x.double())
    for hook in (False, True):
        if hook:
            block.attn.register_forward_hook(lambda *args: None)
        with torch.autocast('cuda', torch.bfloat16):
            actual = step(block, x)
        for name, value in actual.items():
            error = (value.double() - expected[name]).norm() / expected[name].norm()
            assert error < 6e-2, f'{name}, modules: {hook}'


def step(block: ViGBlock, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    x = x.requires_grad_()
    y = block(x, (15, 20))
    weights = torch.sin(torch.arange(y.numel(), device=y.device).double()).view_as(y)
    params = dict(block.named_parameters())
    grads = torch.autograd.grad((y.double() * weights).sum(), [x, *params.values()])
    return dict(zip(('y', 'x', *params), (y.detach(), *grads), strict=True))
