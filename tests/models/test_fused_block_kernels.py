"""The fused form of ViG's block against its modules, in float32.

On a GPU, or on the CPU under Triton's interpreter (`TRITON_INTERPRET=1`, which must be set before
Triton is imported: `test_fused_block.py` runs this file so).
"""

import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import DEVICE, skip_without_kernels

skip_without_kernels()

from mmvig.models.backbones.vig import ViGBlock  # noqa: E402
from mmvig.models.layers.norm import LayerNorm  # noqa: E402

HW = (3, 5)
KINDS = {
    'tiny': dict(conv_act=True, out_act=True),
    'base': {},
    'hierarchical': dict(norm_layer=partial(LayerNorm, eps=1e-5)),
}


@pytest.fixture(params=sorted(KINDS))
def block(request: pytest.FixtureRequest) -> ViGBlock:
    """A block with weights that are all random."""
    block = ViGBlock(32, 2, 48, **KINDS[request.param])
    for param in block.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return block.to(DEVICE)


def steps(block: ViGBlock, monkeypatch: pytest.MonkeyPatch, form: str, *chain: Tensor) -> list:
    """Results, and gradients to inputs and weights, of the block in a form."""
    monkeypatch.setattr('mmvig.models.layers.block.form', lambda x: form)
    leaves = [t.detach().requires_grad_() for t in chain[:2] if t is not None]
    inputs = [*leaves, *[None] * (2 - len(leaves)), *chain[2:]]
    x, y, _ = block.run(*inputs, HW)
    weights = torch.sin(torch.arange(x.numel(), device=x.device, dtype=x.dtype)).view_as(x)
    loss = (weights * x).sum() + (weights.flip(1) * y).sum()
    return [x, y, *torch.autograd.grad(loss, [*leaves, *block.parameters()])]


@pytest.mark.parametrize('conv', ['triton', 'library'])
@pytest.mark.parametrize('pending', [False, True])
def test_same_numbers(
    block: ViGBlock, pending: bool, conv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if conv == 'library':
        monkeypatch.setattr(sys.modules['mmvig.kernels.depthwise_conv'], 'MAX_NUMBERS', 0)
    x, y = (torch.randn(2, 15, 32, device=DEVICE) for _ in range(2))
    chain = (x, y, torch.tensor([0.0, 2.0], device=DEVICE)) if pending else (x, None, None)
    expected = steps(block, monkeypatch, 'plain', *chain)
    actual = steps(block, monkeypatch, 'eager', *chain)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = (a - b).norm() / b.norm()
        assert error < 1e-4, f'{i}: {error}'


def test_inference_follows_the_weights(block: ViGBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmvig.models.layers.block.form', lambda x: 'eager')
    x = torch.randn(2, 15, 32, device=DEVICE)
    with torch.no_grad():
        first, again = block(x, HW), block(x, HW)
        assert torch.equal(first, again)
        block.attn.o_proj.weight.mul_(2)
        assert not torch.allclose(block(x, HW), first)
    torch.testing.assert_close(block(x, HW), block(x.requires_grad_(), HW))


def test_drop_path_of_both_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    block = ViGBlock(32, 2, 48, drop_path=0.5).to(DEVICE).train()
    results = []
    for form in ('plain', 'eager'):
        torch.manual_seed(3)
        x = torch.randn(4, 15, 32, device=DEVICE)
        results.append(steps(block, monkeypatch, form, x, None, None))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
