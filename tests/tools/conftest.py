"""Tiny runs of the shapes configs, shared by the tests of the tools."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'
BASES = {
    'detection': ROOT / 'configs' / 'detection' / 'vig_t_maskrcnn_shapes.py',
    'segmentation': ROOT / 'configs' / 'segmentation' / 'vig_t_upernet_shapes.py',
}
CHECKPOINTS = {'detection': 'epoch_1.pth', 'segmentation': 'iter_2.pth'}
# Both tasks' shapes lie in one folder; either creates them.
TINY = """
_base_ = {base!r}
dataset = dict(
    data_root={data!r}, shapes=dict(num_train=4, num_val=2, height=64, width=96, seed=0)
)
loader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval={interval}))
"""
TASKS = {
    'detection': """
val_evaluator = dict(ann_file={data!r} + '/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
auto_scale_lr = dict(base_batch_size=16)
""",
    # Mixed precision asked for by the config; `--amp` asks for it in detection.
    'segmentation': """
train_cfg = dict(max_iters=2, val_interval=2)
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')
""",
}


@dataclass
class Run:
    """A tiny training run: its config, work dir, checkpoint, output, and the data's folder."""

    task: str
    config: Path
    work_dir: Path
    log: str
    data: Path

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / CHECKPOINTS[self.task]


def run_tool(*command: str | Path, cwd: Path) -> str:
    """Runs a tool as a user does, away from the checkout; returns what it printed."""
    name, *args = map(str, command)
    program = [sys.executable] if name.endswith('.py') else ['bash']
    done = subprocess.run(
        [*program, str(TOOLS / name), *args],
        cwd=cwd,
        env={**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    out = done.stdout + done.stderr
    assert done.returncode == 0, out
    return out


@pytest.fixture(scope='session')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('data') / 'shapes'


def write_config(task: str, data: Path, folder: Path) -> Path:
    """Writes a child of the task's shapes config: four images, two steps."""
    path = folder / f'tiny_{task}.py'
    interval = 1 if task == 'detection' else 2
    text = TINY.format(base=str(BASES[task]), data=str(data), interval=interval)
    path.write_text(text + TASKS[task].format(data=str(data)))
    return path


@pytest.fixture(scope='session', params=sorted(BASES))
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory) -> Run:
    """A run of two steps of each task, with the mixed precision that a CPU lacks."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(request.param, data, folder)
    amp = ['--amp', '--auto-scale-lr'] if request.param == 'detection' else []
    log = run_tool('train.py', config, '--work-dir', folder / 'work', *amp, cwd=folder)
    return Run(request.param, config, folder / 'work', log, data)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a tool in this process; returns the one line that it fails with."""

    def call(*command: str | Path) -> str:
        name, *args = map(str, command)
        monkeypatch.syspath_prepend(str(TOOLS))
        monkeypatch.setattr(sys, 'argv', [name, *args])
        monkeypatch.delenv('LOCAL_RANK', raising=False)
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOLS / name), run_name='__main__')
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith('error: ')
        return line

    return call
