"""Backbones under torch.compile: one graph, any size, few compilations, the same weights' names."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.fx import GraphModule

from mmvig.engine import CompileBackboneHook, compile_backbone

ARCH = dict(embed_dims=32, depth=2, num_heads=2, mlp_dims=48, conv_act=True, out_act=True)
VIG = dict(type='ViG', arch=ARCH)
VIT = dict(type='TimmViT', arch=dict(model_name='test_vit'), window_size=2)  # 6 blocks of 64
ADAPTER = dict(
    type='ViTAdapter', deform_num_heads=4, norm_cfg=dict(type='BN'), num_extra_extractors=0
)
STAGES = dict(
    embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), mlp_dims=(16,) * 4
)
BACKBONES = {
    'vig': VIG,
    'vig-h': dict(type='ViGH', arch=STAGES),
    'vig-adapter': dict(ADAPTER, trunk=VIG, interaction_indexes=((0, 0), (1, 1))),
    'vit-adapter': dict(ADAPTER, trunk=VIT, interaction_indexes=((0, 2), (3, 5))),
}
# What resizing with a fixed ratio and padding to multiples of 32 make of photographs.
SIZES = [(64, 96), (96, 64), (96, 128), (64, 64), (224, 224)]
every_backbone = pytest.mark.parametrize('cfg', BACKBONES.values(), ids=BACKBONES)


class Compilations:
    """A back end of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: GraphModule, inputs: list) -> GraphModule:
        self.count += 1
        return graph


def build(cfg: dict) -> nn.Module:
    """The backbone with nothing asleep that starts at 0."""
    torch._dynamo.reset()
    model = MODELS.build(cfg)
    for param in model.parameters():
        if not param.any():
            nn.init.normal_(param, std=0.1)
    return model


@pytest.mark.parametrize(('version', 'text'), [('2.11.0+cu130', 'op'), ('2.14.1', 'all')])
def test_inductor_does_not_write_out_operands(
    version: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does so for a log that nobody reads; elsewhere it stays as it is."""
    from torch._inductor.exc import OperatorIssue

    monkeypatch.setattr(torch, '__version__', version)
    monkeypatch.setattr(OperatorIssue, 'operator_str', staticmethod(lambda *args: 'all'))
    compile_backbone(nn.Linear(1, 1))
    assert OperatorIssue.operator_str('op', ['operand'], {}) == text


@every_backbone
def test_multi_scale_training_compiles_once_where_sizes_are_left_open(cfg: dict) -> None:
    """One whole graph for all sizes, forward and backward."""
    model, backend = build(cfg), Compilations()
    compile_backbone(model, dynamic=True, backend=backend)
    for size in SIZES:
        sum(out.sum() for out in model(torch.randn(2, 3, *size))).backward()
    assert backend.count == 1


def test_by_default_it_compiles_for_the_first_size_and_then_for_any() -> None:
    """Padding has a graph of its own, and so have inference and a batch of one image."""
    model, backend = build(VIG), Compilations()
    compile_backbone(model, backend=backend)
    for size in SIZES:
        model(torch.randn(2, 3, *size))
    assert backend.count == 2
    for size in ((50, 64), (50, 75), (64, 75), (33, 47)):
        model(torch.randn(2, 3, *size))
    with torch.no_grad():
        for size in SIZES:
            model.eval()(torch.randn(1, 3, *size))
    assert backend.count <= 6


@every_backbone
def test_compiled_forward_and_gradients_are_the_eager_ones(cfg: dict) -> None:
    eager = build(cfg)
    compiled = copy.deepcopy(eager)
    compile_backbone(compiled, dynamic=False, backend='aot_eager')
    x = torch.randn(2, 3, 64, 96)
    results: list[list[Tensor]] = []
    for model in (eager, compiled):
        outs = model(x)
        sum(out.square().mean() for out in outs).backward()
        results.append([*outs, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_checkpoints_and_copies_know_nothing_of_compilation() -> None:
    model = build(VIG)
    names = list(model.state_dict())
    compile_backbone(model, backend='eager')
    model(torch.randn(1, 3, 32, 32))
    assert list(model.state_dict()) == names
    assert copy.deepcopy(model)._compiled_call_impl is None


def test_the_hook_compiles_the_backbone_alone() -> None:
    model = nn.Module()
    model.backbone, model.neck = build(VIG), nn.Identity()
    backend = Compilations()
    runner = type('Runner', (), dict(model=model))
    CompileBackboneHook(dynamic=True, backend=backend).before_run(runner)
    model.backbone(torch.randn(1, 3, 32, 32))
    assert backend.count == 1
    assert model.neck._compiled_call_impl is None


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="mode must be one of default, .* got 'fast'"):
        compile_backbone(nn.Identity(), mode='fast')
