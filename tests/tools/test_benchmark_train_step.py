"""Command line of benchmark_train_step.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS

from tests.tools.conftest import ROOT, TOOLS, run_tool, write_config

MMDET = """
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
steps = [dict(type="LoadImageFromFile"), dict(type="PackDetInputs")]
train_dataloader = dict(dataset=dict(pipeline=steps))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.02))
"""


def test_steps_parts_and_file(data: Path, tmp_path: Path) -> None:
    config = write_config('detection', data, tmp_path)
    args = ['--batch-size', 2, '--workers', 0, '--warmup', 1, '--steps', 2, '--parts']
    out = run_tool('benchmark_train_step.py', config, *args, '--json', 'steps.json', cwd=tmp_path)
    (row,) = json.loads((tmp_path / 'steps.json').read_text())['rows']
    assert row['config'] == str(config) and f'1: {config}' in out
    assert 0 < row['data_ms'] < row['step_ms'] and row['mean_ms'] > 0
    parts = row['parts_ms']
    assert {'backbone', 'RPN losses', 'mask targets', 'backward', 'optimizer'} <= set(parts)
    assert all(spent > 0 for spent in parts.values()) and 'mask targets' in out


def test_our_heads_are_those_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--our-heads` makes of mmdet's config is what ours say, head by head."""
    monkeypatch.syspath_prepend(str(TOOLS))
    from benchmark_train_step import use_our_heads

    file = tmp_path / 'theirs.py'
    file.write_text(MMDET)
    theirs, ours = (
        Config.fromfile(f) for f in (file, ROOT / 'configs' / 'detection' / 'vig_t_maskrcnn.py')
    )
    before = ours.pretty_text
    for cfg in (theirs, ours):
        use_our_heads(cfg)
    for path in (
        'data_preprocessor',
        'rpn_head',
        'rpn_head.bbox_coder',
        'roi_head.bbox_head.bbox_coder',
        'roi_head',
        'roi_head.bbox_head',
        'roi_head.mask_head',
        'roi_head.bbox_roi_extractor',
        'roi_head.mask_roi_extractor',
    ):
        kinds = []
        for cfg in (theirs, ours):
            node = cfg.model
            for key in path.split('.'):
                node = node[key]
            kinds.append(node.type)
        assert kinds[0] == kinds[1], path
    for cfg in (theirs, ours):
        steps = [step['type'] for step in cfg.train_dataloader.dataset.pipeline]
        assert steps[-2:] == ['PackMasks', 'PackDetInputs']
        assert cfg.train_dataloader.pin_memory
        assert cfg.train_dataloader.collate_fn == dict(type='one_buffer_collate')
        assert cfg.default_hooks.early_losses == dict(type='EarlyLossHook')
        settings = cfg.optim_wrapper.optimizer
        assert settings.type == 'FusedAdamW' or settings.fused
        OPTIMIZERS.build(dict(settings, params=[torch.zeros(1)]))
    assert ours.pretty_text == before


def test_mistakes_end_in_one_line(fail: Callable[..., str], data: Path, tmp_path: Path) -> None:
    config = write_config('detection', data, tmp_path)
    assert '--steps are at least 1' in fail('benchmark_train_step.py', config, '--steps', 0)
