"""What the tools share: precision, errors, checkpoints."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from torch import nn

from tests.tools.conftest import TOOLS


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def config(**optim_wrapper) -> Config:
    return Config(dict(optim_wrapper=optim_wrapper))


@pytest.mark.parametrize('capability, dtype, scale', [
    ((9, 0), 'bfloat16', dict(enabled=False)), ((7, 5), 'float16', 'dynamic')
])  # fmt: skip
def test_amp_chooses_the_type_that_the_gpu_has(monkeypatch, capability, dtype, scale) -> None:
    from train import set_precision

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: capability)
    cfg = config(type='OptimWrapper', clip_grad=dict(max_norm=1.0))
    assert set_precision(cfg, amp=True) is None
    assert cfg.optim_wrapper.to_dict() == dict(
        type='AmpOptimWrapper', dtype=dtype, loss_scale=scale, clip_grad=dict(max_norm=1.0)
    )


def test_a_config_with_its_own_mixed_precision_keeps_it_on_a_gpu(monkeypatch) -> None:
    from train import set_precision

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = config(type='AmpOptimWrapper', dtype='float16', loss_scale=512.0)
    before = cfg.optim_wrapper.to_dict()
    for amp in (False, True):
        assert set_precision(cfg, amp) is None
        assert cfg.optim_wrapper.to_dict() == before


def test_without_a_gpu_nothing_of_mixed_precision_stays(monkeypatch) -> None:
    from train import set_precision

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cfg = config(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0, accumulative_counts=2)
    assert 'float32' in set_precision(cfg, amp=False)
    assert cfg.optim_wrapper.to_dict() == dict(type='OptimWrapper', accumulative_counts=2)
    assert set_precision(cfg, amp=False) is None
    assert 'float32' in set_precision(cfg, amp=True)


def test_amp_refuses_a_wrapper_that_has_no_such_form() -> None:
    from train import set_precision

    with pytest.raises(ValueError, match="--amp needs .* got 'DeepSpeedOptimWrapper'"):
        set_precision(config(type='DeepSpeedOptimWrapper'), amp=True)


def raise_value_error() -> None:
    raise ValueError('two\nlines')


@pytest.mark.parametrize('module, short', [('mmvig.some.module', True), ('elsewhere', False)])
def test_only_this_projects_own_errors_become_one_line(
    monkeypatch, capsys, module: str, short: bool
) -> None:
    from cli import run

    monkeypatch.setitem(raise_value_error.__globals__, '__name__', module)
    with pytest.raises(SystemExit if short else ValueError) as caught:
        run(raise_value_error)
    assert capsys.readouterr().err == ('error: two lines\n' if short else '')
    assert not short or caught.value.code == 2


def test_a_bug_of_this_projects_own_keeps_its_traceback(monkeypatch) -> None:
    from cli import run

    monkeypatch.setitem(raise_value_error.__globals__, '__name__', 'mmvig.some.module')
    with pytest.raises(ValueError, match='invalid literal'):
        run(lambda: int('five'))


@pytest.mark.skipif(torch.__version__ < (2, 6), reason='torch.load defaults to weights_only=False')
def test_torch_load_reads_what_mmengine_stores(tmp_path: Path) -> None:
    from checkpoints import allow_mmengine_checkpoints

    losses = HistoryBuffer([1.0, 2.0], [1, 1])
    stored = dict(message_hub=dict(losses=losses, best=np.float32(0.5), seen=np.int64(3)))
    torch.save(stored, tmp_path / 'x.pth')
    allow_mmengine_checkpoints()
    hub = torch.load(tmp_path / 'x.pth')['message_hub']
    assert hub['losses'].mean() == 1.5
    assert (hub['best'], hub['seen']) == (0.5, 3)


class Evil:
    def __reduce__(self):
        return sys.exit, ('ran',)


class EvilAttribute:
    def __reduce__(self):
        return getattr, (np.ndarray, 'tofile')


@pytest.mark.skipif(torch.__version__ < (2, 6), reason='torch.load defaults to weights_only=False')
@pytest.mark.parametrize('content', [Evil(), EvilAttribute()])
def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path, content: object) -> None:
    from checkpoints import load_state_dict

    torch.save(dict(state_dict=dict(weight=torch.ones(1)), x=content), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'x\.pth'):
        load_state_dict(tmp_path / 'x.pth')


@pytest.mark.parametrize('content', [torch.ones(2), {}, {'model': {'weight': torch.ones(2)}}])
def test_a_file_without_mmengine_weights_is_refused(tmp_path: Path, content: object) -> None:
    from checkpoints import load_state_dict

    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'x\.pth holds no state dict'):
        load_state_dict(tmp_path / 'x.pth')


def test_weights_that_do_not_fit_are_counted_and_named() -> None:
    from checkpoints import check_fits

    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    check_fits(model, {f'module.{k}': v for k, v in model.state_dict().items()}, 'x.pth')
    weights = {'0.weight': torch.ones(2, 2), '0.bias': torch.ones(3), 'head.bias': torch.ones(1)}
    with pytest.raises(ValueError) as caught:
        check_fits(model, weights, 'x.pth')
    for part in ('2 missing (1.bias ...)', '1 unexpected (head.bias ...)', '(0.weight ...)'):
        assert part in str(caught.value)


def test_a_hook_is_added_beside_others_and_not_twice() -> None:
    from cli import add_hook

    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    add_hook(cfg, type='CompileBackboneHook', mode='default')
    add_hook(cfg, type='CompileBackboneHook', mode='max-autotune')
    assert [h.to_dict() for h in cfg.custom_hooks] == [
        dict(type='EMAHook'),
        dict(type='CompileBackboneHook', mode='default'),
    ]
    add_hook(empty := Config(), type='CudaGraphHook')
    assert [h.type for h in empty.custom_hooks] == ['CudaGraphHook']
