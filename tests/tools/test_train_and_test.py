"""tools/train.py and tools/test.py, and their launchers, on tiny shapes."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.tools.conftest import ROOT, Run, run_tool, write_config

AMP_NOTE = 'mixed precision needs a GPU and there is none: training in float32'


@pytest.mark.skipif(torch.cuda.is_available(), reason='says what happens without a GPU')
def test_mixed_precision_on_a_cpu_explains_itself_once(trained: Run) -> None:
    assert trained.log.count(AMP_NOTE) == 1
    (log,) = trained.work_dir.glob('*/*.log')
    assert log.read_text().count(AMP_NOTE) == 1


def test_training_writes_a_checkpoint_scales_the_rate_and_evaluates(trained: Run) -> None:
    assert trained.checkpoint.is_file()
    (scalars,) = trained.work_dir.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert [record['loss'] > 0 for record in records if 'loss' in record] == [True, True]
    metric = 'coco/segm_mAP' if trained.task == 'detection' else 'mIoU'
    assert any(metric in record for record in records)
    # Two images a step, where the config's learning rate is for 16.
    scaled = 'Scaling the original LR by 0.125' in trained.log
    assert scaled == (trained.task == 'detection')


def test_testing_evaluates_dumps_and_draws(trained: Run, tmp_path: Path) -> None:
    out = 'out.pkl' if trained.task == 'detection' else 'out'
    log = run_tool(
        *('test.py', trained.config, trained.checkpoint),
        *('--work-dir', 'work', '--out', out, '--show-dir', 'drawn', '--cuda-graph'),
        cwd=tmp_path,
    )
    assert ('coco/bbox_mAP' if trained.task == 'detection' else 'mIoU') in log
    if trained.task == 'detection':
        with open(tmp_path / out, 'rb') as file:
            assert len(pickle.load(file)) == 2
        assert len(list((tmp_path / 'drawn').glob('*.jpg'))) == 2
    else:
        assert len(list((tmp_path / out).glob('*.png'))) == 2
        assert len(list((tmp_path / 'drawn').rglob('*.png'))) == 2


def test_resume_goes_on(trained: Run, tmp_path: Path) -> None:
    work_dir = tmp_path / 'work'
    if trained.task == 'detection':
        resume = ['--resume', trained.checkpoint]
    else:  # from the last one in the work dir
        work_dir.mkdir()
        shutil.copy(trained.checkpoint, work_dir)
        (work_dir / 'last_checkpoint').write_text(str(work_dir / trained.checkpoint.name))
        resume = ['--resume']
    length = 'max_epochs=2' if trained.task == 'detection' else 'max_iters=3'
    options = ['--cfg-options', f'train_cfg.{length}', 'train_cfg.val_interval=9']
    log = run_tool(
        *('train.py', trained.config, '--work-dir', work_dir), *resume, *options, cwd=tmp_path
    )
    assert 'resumed epoch: 1, iter: 2' in log or 'resumed epoch: 0, iter: 2' in log
    assert ('Epoch(train) [2]' if trained.task == 'detection' else 'Iter(train) [3/3]') in log
    assert 'weights_only=False' not in log  # what mmengine does where it is not enough
    assert 'Iter(train) [1/' not in log and 'Epoch(train) [1]' not in log


NARROW = """
arch = dict(embed_dims=48, depth=4, num_heads=3, mlp_dims=48, conv_act=True, out_act=True)
model = dict(
    backbone=dict(
        trunk=dict(_delete_=True, type='ViG', arch=arch),
        deform_num_heads=4,
        interaction_indexes=[(0, 0), (1, 1), (2, 2), (3, 3)],
    ),
    decode_head=dict(in_channels=[48, 48, 48, 48]),
    auxiliary_head=dict(in_channels=48),
)
custom_hooks = [dict(type='CompileBackboneHook', backend='eager')]
"""


def test_compiled_training_writes_the_same_checkpoint_names(data: Path, tmp_path: Path) -> None:
    """The flag leaves a config's own hook as it is: its back end needs no compiler."""
    config = write_config('segmentation', data, tmp_path)
    config.write_text(config.read_text() + NARROW)
    log = run_tool(
        *('train.py', config, '--work-dir', 'work', '--compile'),
        *('--cfg-options', 'train_cfg.val_interval=9'),
        cwd=tmp_path,
    )
    assert 'Iter(train) [2/2]' in log
    weights = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=False)['state_dict']
    assert 'backbone.trunk.blocks.0.attn.qkv_proj.weight' in weights
    assert not [name for name in weights if '_orig_mod' in name]


@pytest.mark.skipif(torch.cuda.is_available(), reason='wants one GPU a process')
def test_launchers_run_several_processes_on_a_cpu(data: Path, tmp_path: Path) -> None:
    config = write_config('segmentation', data, tmp_path)
    batch_norm = [f'model.{part}.norm_cfg.type=BN' for part in ('decode_head', 'auxiliary_head')]
    options = ['--cfg-options', 'model.backbone.norm_cfg.type=BN', *batch_norm]
    log = run_tool('dist_train.sh', config, '2', '--work-dir', 'work', *options, cwd=tmp_path)
    assert 'Iter(train) [2/2]' in log
    checkpoint = tmp_path / 'work' / 'iter_2.pth'
    log = run_tool(
        *('dist_test.sh', config, checkpoint, '1', '--work-dir', 'work'), *options, cwd=tmp_path
    )
    assert 'mIoU' in log


def test_bad_input_gets_one_line(fail, data: Path, tmp_path: Path) -> None:
    config = write_config('detection', data, tmp_path)
    work_dir = tmp_path / 'work'
    assert 'nowhere.py is not a file' in fail('train.py', 'nowhere.py')
    occupied = tmp_path / 'file'
    occupied.touch()
    line = fail('train.py', config, '--work-dir', occupied / 'work')
    assert f'cannot write to {occupied / "work"}: ' in line
    arch = 'model.backbone.trunk.arch=huge'
    line = fail('train.py', config, '--work-dir', work_dir, '--cfg-options', arch)
    assert 'huge' in line and 'tiny' in line


def test_missing_data_are_named_and_nothing_is_written(fail, tmp_path: Path) -> None:
    config = ROOT / 'configs' / 'detection' / 'vig_t_maskrcnn.py'
    loaders = [f'{name}_dataloader.dataset.data_root={tmp_path}/coco/' for name in ('train', 'val')]
    work_dir = tmp_path / 'work'
    line = fail('train.py', config, '--work-dir', work_dir, '--cfg-options', *loaders)
    assert f'{tmp_path}/coco' in line
    assert not work_dir.exists()


def test_auto_scale_lr_needs_a_base_batch_size(fail, data: Path, tmp_path: Path) -> None:
    config = write_config('segmentation', data, tmp_path)
    options = ['--cfg-options', 'auto_scale_lr=None']
    assert 'auto_scale_lr.base_batch_size' in fail('train.py', config, '--auto-scale-lr', *options)


# Of each task: settings that fit the small arch, and where the first weights of another shape are.
FITTED = dict(
    detection=(['model.neck.in_channels=[384,384,384,384]'], 'backbone.'),
    segmentation=(
        [
            'model.decode_head.in_channels=[384,384,384,384]',
            'model.auxiliary_head.in_channels=384',
        ],
        'auxiliary_head.',
    ),
)


def test_checkpoints_that_do_not_fit_are_refused(fail, trained: Run, tmp_path: Path) -> None:
    work_dir = ['--work-dir', tmp_path / 'work']
    truncated = tmp_path / 'truncated.pth'
    truncated.write_bytes(trained.checkpoint.read_bytes()[:5000])
    assert 'truncated.pth (5000 bytes)' in fail('test.py', trained.config, truncated, *work_dir)
    page = tmp_path / 'page.pth'
    page.write_text('<html><body>not found</body></html>')
    assert 'page.pth is an HTML page' in fail('test.py', trained.config, page, *work_dir)
    assert 'nowhere.pth' in fail('test.py', trained.config, 'nowhere.pth', *work_dir)
    small = ['--cfg-options', 'model.backbone.trunk.arch=small']
    fitted, first = FITTED[trained.task]
    for command in (
        ['test.py', trained.config, trained.checkpoint],
        ['train.py', trained.config, '--resume', trained.checkpoint],
    ):
        line = fail(*command, *work_dir, *small)
        assert f'{fitted[0].split(".")[1]}.in_channels is [192, 192, 192, 192]' in line
        assert 'in_channels=[384, 384, 384, 384]' in line
        line = fail(*command, *work_dir, *small, *fitted)
        assert f'{trained.checkpoint} does not fit the config' in line
        assert f'of another shape ({first}' in line


def test_other_errors_keep_their_traceback(fail, data: Path, tmp_path: Path) -> None:
    config = write_config('detection', data, tmp_path)
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', 'param_scheduler=5']
    with pytest.raises(TypeError):
        fail('train.py', config, *options)
