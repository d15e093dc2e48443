"""The backbones in the form that they take on a GPU, run on the CPU under Triton's interpreter.

Only where the tensors are is different: every dispatch is told that there is a kernel for them.
`test_gpu_forms.py` runs this file.
"""

import copy
import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmvig.models.backbones import vig
from mmvig.models.layers.conv import PatchConv2d
from tests.models import test_vit_adapter
from tests.models.test_vig import SMALL
from tests.models.test_vig_h import small_vig_h


def take_gpu_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has eager calls take the kernels, wherever the tensors are."""
    importlib.import_module('mmvig.models.layers.fused_block')  # on a GPU, imported when called
    for module in [m for name, m in sys.modules.items() if name.startswith('mmvig.')]:
        if hasattr(module, 'form'):
            monkeypatch.setattr(module, 'form', lambda *tensors: 'eager')
        if hasattr(module, 'WIDE_RESULTS'):  # which mm has on a GPU only
            monkeypatch.setattr(module, 'WIDE_RESULTS', False)
    deform = importlib.import_module('mmvig.kernels.ms_deform_attn')
    monkeypatch.setattr(deform, '_has_kernel', lambda *tensors: True)
    trust = importlib.import_module('mmvig.kernels.bigla_trust')
    monkeypatch.setattr(trust, 'trusted', lambda *args: True)


def small_adapter() -> nn.Module:
    """Two blocks, one an interaction, with heads that the kernels take."""
    trunk = dict(type='ViG', arch=dict(SMALL, embed_dims=64, num_heads=2, depth=2))
    return test_vit_adapter.small_adapter(
        trunk=trunk,
        interaction_indexes=((0, 0), (1, 1)),
        norm_cfg=dict(type='BN'),
        deform_num_heads=2,
        n_points=2,
    )


def training_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients."""
    model.zero_grad()
    outs = model(x)
    sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outs).backward()
    found = {f'output {i}': o.detach() for i, o in enumerate(outs)}
    return found | {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize('build', [small_adapter, small_vig_h])
def test_same_as_on_the_cpu(build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    # In evaluation: batch norm over the few pixels here would enlarge any rounding.
    model, x = build().eval(), torch.randn(1, 3, 32, 64)
    expected = training_step(model, x)
    launched = note_launches(monkeypatch)
    take_gpu_forms(monkeypatch)
    for name, found in training_step(model, x).items():
        error = (found - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name
    absent = {x for x in LAUNCHERS if x[0].startswith(ADAPTER) and build is not small_adapter}
    assert set(LAUNCHERS) - launched == absent


@pytest.mark.parametrize(
    ('dtype', 'limit', 'launches'),
    [
        (torch.float32, 1e-4, [('batch_norm_kernels', 'forward')]),
        # kernels that float32 has not
        (
            torch.float16, 1e-2,
            [(m, 'forward') for m in ('finest_map_kernels', 'swiglu_product_kernels')],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_inference_is_the_same(
    dtype: torch.dtype, limit: float, launches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is kept of the weights, too, in place when they have changed."""
    model, x = small_adapter().eval(), torch.randn(1, 3, 32, 32)
    randomize_norms(model)
    launched, before = note_launches(monkeypatch), copy.deepcopy(model.state_dict())
    expected = inferences(model, x)
    take_gpu_forms(monkeypatch)
    model.load_state_dict(before)
    with torch.autocast('cpu', torch.float16, enabled=dtype == torch.float16):
        found = inferences(model, x)
    for outs, wanted in zip(found, expected, strict=True):
        for out, y in zip(outs, wanted, strict=True):
            assert out.dtype == dtype
            assert (out - y).norm() / y.norm() < limit
    assert launched.issuperset(launches)


@torch.no_grad()
def inferences(model: nn.Module, x: Tensor) -> list[tuple[Tensor, ...]]:
    """Outputs twice, and once with other weights."""
    outs = [model(x), model(x)]
    for param in model.parameters():
        param.mul_(0.9)
    return [*outs, model(x)]


def test_batch_norm_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looser than the others, since norms of few pixels enlarge any rounding."""
    model, x = small_adapter().train(), torch.randn(2, 3, 32, 64)
    before = copy.deepcopy(model.state_dict())
    expected, buffers = training_step(model, x), dict(model.named_buffers())
    buffers = {name: b.clone() for name, b in buffers.items()}
    model.load_state_dict(before)
    launched = note_launches(monkeypatch)
    take_gpu_forms(monkeypatch)
    versions = {name: b._version for name, b in model.named_buffers()}
    for name, found in training_step(model, x).items():
        error = (found - expected[name]).norm() / expected[name].norm()
        invariant = name in ('up.bias', 'spm.fc1.bias')  # a norm follows: the gradient is 0
        assert invariant or error < 5e-3, f'{name}: {error}'
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-3, atol=1e-4)
        if name.endswith('num_batches_tracked'):  # by which kept weights are renewed
            assert buffer._version > versions[name], name
    assert ('batch_norm_kernels', 'backward') in launched


def test_patch_embedding_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first conv is a product then, with gradients in float32; in inference of kept weights."""
    conv = PatchConv2d(3, 12, 9, stride=8, padding=1)
    x = torch.randn(2, 3, 40, 32).half()

    def step() -> dict[str, Tensor]:
        with torch.autocast('cpu', torch.float16):
            with torch.no_grad():
                outs = {'inference': conv(x), 'again': conv(x)}
            outs['training'] = conv(x)
        conv.zero_grad()
        grad = torch.linspace(-1, 1, outs['training'].numel()).view(outs['training'].shape)
        outs['training'].backward(grad)
        return outs | {name: p.grad.clone() for name, p in conv.named_parameters()}

    expected = step()
    take_gpu_forms(monkeypatch)
    launched = note_launches(monkeypatch)
    for name, found in step().items():
        y = expected[name]
        assert found.shape == y.shape and found.dtype == y.dtype, name
        assert (found - y).norm() / y.norm() < 2e-3, name
    assert ('patch_conv_kernels', 'gather') in launched


def test_casts_ahead_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_adapter().eval(), torch.randn(1, 3, 32, 32)
    take_gpu_forms(monkeypatch)
    steps = []
    for _ in range(2):
        with torch.autocast('cpu', torch.float16):
            steps.append(training_step(model, x))
        monkeypatch.setattr(type(model), '_cast_ahead', lambda self, x: nullcontext())
        monkeypatch.setattr(vig, 'cast_blocks_ahead', lambda forms, x: nullcontext())
    assert all(torch.equal(value, steps[1][name]) for name, value in steps[0].items())


def randomize_norms(model: nn.Module) -> None:
    """Batch norm's statistics other than 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)


# Forward and backward of every operator: modules of `mmvig.kernels`, and their functions.
LAUNCHERS = [
    ('bigla_fwd', 'forward'),
    ('bigla_bwd', 'backward'),
    ('ms_deform_attn_fwd', 'forward'),
    ('ms_deform_attn_bwd', 'backward'),
    ('depthwise_conv_kernels', 'convolve'),
    ('depthwise_conv_kernels', 'backward'),
    ('gated_head_norm_kernels', 'forward'),
    ('gated_head_norm_kernels', 'backward'),
    ('log_gates_kernels', 'forward'),
    ('log_gates_kernels', 'backward'),
    ('residual_norm_kernels', 'forward'),
    ('residual_norm_kernels', 'backward'),
    ('swiglu_kernels', 'forward'),
    ('swiglu_kernels', 'backward'),
    ('channels_last_kernels', 'launch'),
    ('sampling_points_kernels', 'forward'),
    ('sampling_points_kernels', 'backward'),
    ('resized_sum_kernels', 'forward'),
    ('resized_sum_kernels', 'backward'),
]
ADAPTER = ('ms_deform_attn', 'sampling_points', 'resized_sum')  # modules of these are in it alone


def note_launches(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Collects the launchers that are called from here on."""
    called: set[tuple[str, str]] = set()

    def noted(name: tuple[str, str], launch: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return launch(*args, **kwargs)

        return call

    others = [('batch_norm_kernels', way) for way in ('forward', 'backward')]
    others.append(('patch_conv_kernels', 'gather'))  # in half precision alone
    # in half precision, without gradients
    others += [(m, 'forward') for m in ('finest_map_kernels', 'swiglu_product_kernels')]
    for module, function in [*LAUNCHERS, *others]:
        kernels = importlib.import_module(f'mmvig.kernels.{module}')
        launch = getattr(kernels, function)
        monkeypatch.setattr(kernels, function, noted((module, function), launch))
    return called
