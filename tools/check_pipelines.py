"""Trains pipelines for some steps on a few real images, evaluates, and says which of them learn.

`python tools/check_pipelines.py configs/detection/vig_t_dino.py configs/segmentation/vig_t_fpn.py \
    --data-root-coco data/coco100/ --data-root-camvid data/camvid/ --jobs 8 --markdown pipelines.md`

Any detection or segmentation config will do. It keeps its model, its pipeline for COCO and its
layer-wise learning rates; the data, the number of classes of a segmentor, the schedule and the
optimizer are replaced (`convert`). Every config runs in a process of its own, so that none stops
the others; the exit status is 1 if one fails: by an error, a loss that is not finite, or one that
does not fall. What these runs say of accuracy is nothing.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cli
import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.runner import Runner
from short_runs import innermost_dataset, leave_no_trace, take_bfloat16

from mmvig.datasets import check_data

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
WARM_UP = 10  # iterations
MEAN_OF = 5  # iterations, at both ends
PROGRESS = 10  # iterations from one line to the next
POLL = 0.5  # seconds between looks at a process
METRICS = ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU')


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description='Train pipelines for some steps, and evaluate.')
    parser.add_argument('configs', nargs='+', help='config files')
    parser.add_argument(
        '--data-root-coco',
        default='data/coco100/',
        help="for detection: COCO 2017, or a part of it, in COCO's layout",
    )
    parser.add_argument(
        '--data-root-camvid', default='data/camvid/', help="for segmentation: in mmseg's layout"
    )
    parser.add_argument(
        '--iterations',
        type=int,
        default=52,
        help=f'at least {WARM_UP + 2 * MEAN_OF} (default: %(default)s); 2 to 15 seconds each '
        'on two CPU cores, with a line at the start, for every tenth and at the end',
    )
    parser.add_argument(
        '--images',
        type=int,
        default=8,
        help='the first so many (default: %(default)s), to train and to evaluate; few let the loss '
        'fall in few iterations',
    )
    parser.add_argument('--jobs', type=int, default=1, help='configs at a time')
    parser.add_argument(
        '--timeout',
        type=float,
        default=1800,
        metavar='SECONDS',
        help='for one config, which fails after it (default: %(default)s)',
    )
    parser.add_argument('--float32', action='store_true', help='instead of bfloat16 on a GPU')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='for every config')
    parser.add_argument('--json', metavar='FILE', help='write all that was found')
    parser.add_argument('--markdown', metavar='FILE', help='write the table')
    return parser.parse_args()


def load(args: argparse.Namespace, name: str) -> Config:
    """The config, changed to the data and to a short schedule.

    Raises:
        FileNotFoundError: If it is no file.
        ValueError: If it is neither for mmdet nor for mmseg.
    """
    if not Path(name).is_file():
        raise FileNotFoundError(f'config {name} is not a file')
    cfg = Config.fromfile(name)
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmseg'):
        raise ValueError(f'{name} must have the default_scope mmdet or mmseg, got {scope}')
    if scope == 'mmdet':
        use_coco(cfg, args.data_root_coco)
    else:
        use_camvid(cfg, args.data_root_camvid)
    for stage in ('train', 'val'):
        innermost_dataset(cfg, stage).indices = args.images
    shorten(cfg, args.iterations, args.float32)
    cfg.merge_from_dict(args.cfg_options or {})
    return cfg


def use_coco(cfg: Config, root: str) -> None:
    """Has a detector train and evaluate on a folder in COCO's layout, by its own pipelines."""
    for stage in ('train', 'val'):
        ann_file = f'annotations/instances_{stage}2017.json'
        innermost_dataset(cfg, stage).update(
            data_root=root, ann_file=ann_file, data_prefix=dict(img=f'{stage}2017/')
        )
    cfg.val_evaluator.ann_file = str(Path(root, ann_file))
    cfg.train_dataloader.batch_size = 2


def use_camvid(cfg: Config, root: str) -> None:
    """Has a segmentor train and evaluate on CamVid: 11 classes, crops of 352 x 480."""
    camvid = Config.fromfile(CONFIGS / 'segmentation' / '_base_' / 'datasets' / 'camvid.py')
    for key in ('train_dataloader', 'val_dataloader', 'val_evaluator'):
        cfg[key] = camvid[key]
    for stage in ('train', 'val'):
        innermost_dataset(cfg, stage).data_root = root
    cfg.train_dataloader.batch_size = 8
    cfg.model.data_preprocessor.size = camvid.crop_size
    set_num_classes(cfg.model, cfg.model.decode_head.num_classes, 11)
    cfg.model.test_cfg = dict(mode='whole')


def set_num_classes(settings: Any, old: int, new: int) -> None:
    """Changes the number of classes wherever it stands, with the weights of the classes."""
    if isinstance(settings, list | tuple):
        for value in settings:
            set_num_classes(value, old, new)
    elif isinstance(settings, dict):
        for key, value in settings.items():
            if key == 'num_classes' and value == old:
                settings[key] = new
            elif key == 'class_weight' and isinstance(value, list) and len(value) == old + 1:
                settings[key] = [*value[:new], value[-1]]  # the last one is that of no object
            else:
                set_num_classes(value, old, new)


def shorten(cfg: Config, iterations: int, float32: bool) -> None:
    """AdamW for some iterations, then one evaluation; no checkpoints, no logs, random weights."""
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
    cfg.val_cfg = dict(type='ValLoop')
    for key in ('dataloader', 'evaluator', 'cfg'):
        cfg[f'test_{key}'] = None
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=2, persistent_workers=True)
    wrapper = cfg.optim_wrapper
    wrapper.type = 'OptimWrapper'
    wrapper.optimizer = dict(type='AdamW', lr=2e-4, weight_decay=0.05)  # update() would merge
    if not float32:
        take_bfloat16(cfg)
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=WARM_UP)]
    leave_no_trace(cfg)
    cfg.env_cfg.cudnn_benchmark = False
    cfg.load_from, cfg.resume, cfg.launcher = None, False, 'none'


class Recorder(Hook):
    """Keeps each iteration's loss, the sum of all terms, and the metrics; says how far it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.losses: list[torch.Tensor] = []
        self.metrics: dict[str, float] | None = None

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Without a wait for the device."""
        self.losses.append(outputs['loss'].detach().float())
        if len(self.losses) % PROGRESS == 0:
            done = f'{len(self.losses)} of {runner.max_iters} iterations'
            print(f'{self.name}: {done}', file=sys.stderr, flush=True)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Called when the evaluation is done."""
        self.metrics = {k: float(v) for k, v in (metrics or {}).items() if k in METRICS}


def train(cfg: Config, recorder: Recorder) -> None:
    """Trains and evaluates, as `tools/train.py` does, away from everybody's folders."""
    check_data(cfg, ['train_dataloader', 'val_dataloader'])
    with tempfile.TemporaryDirectory() as work_dir:
        cfg.work_dir = work_dir
        runner = cli.build_runner(cfg)
        runner.register_hook(recorder)
        torch.autograd.set_multithreading_enabled(False)
        runner.train()


def try_config(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Figures of one config, with the error that ended it, if one did; for a process of its own."""
    start = time.monotonic()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    recorder, row = Recorder(name), dict(config=name, error=None)
    try:
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
            train(load(args, name), recorder)
    except Exception as error:  # whatever it is, the other configs go on
        text = ' '.join(str(error).split())[:200]
        row.update(error=f'{type(error).__name__}: {text}', traceback=traceback.format_exc())
    losses = [loss.item() for loss in recorder.losses]
    row.update(losses=losses, metrics=recorder.metrics, seconds=time.monotonic() - start)
    if torch.cuda.is_available():
        row['peak_gib'] = torch.cuda.max_memory_allocated() / 2**30
    return row


def try_alone(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """`try_config` in a process that may die, or not end in time."""
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, args, name))
    print(f'{name} started', file=sys.stderr, flush=True)
    process.start()
    sender.close()
    end = time.monotonic() + args.timeout
    try:
        # A loader's workers that outlive the process hold the pipe open, so it has no end then.
        while process.is_alive() and not receiver.poll(POLL):
            if time.monotonic() > end:
                return dict(config=name, error=f'not done after {args.timeout} s (--timeout)')
        with contextlib.suppress(EOFError):
            if receiver.poll():
                return receiver.recv()
        process.join()
        return dict(config=name, error=f'its process died with status {process.exitcode}')
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, args: argparse.Namespace, name: str) -> None:
    sender.send(try_config(args, name))


def find_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with a run, in words; None where it trained and was evaluated."""
    if row['error']:
        return row['error']
    if not all(map(math.isfinite, row['losses'])):
        return 'the loss is not finite'
    if row['metrics'] is None:
        return 'it was not evaluated'
    first, last = ends(row)
    return None if last < first else 'the loss does not fall'


def ends(row: dict[str, Any]) -> tuple[float, float]:
    """Mean losses of the first and of the last iterations."""
    return tuple(
        statistics.mean(part) for part in (row['losses'][:MEAN_OF], row['losses'][-MEAN_OF:])
    )


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table: config, loss, memory, time, metrics, verdict."""
    loss = ' to '.join(f'{x:.2f}' for x in ends(row)) if row.get('losses') else '-'
    memory = f'{row["peak_gib"]:.1f} GiB' if 'peak_gib' in row else '-'
    seconds = f'{row["seconds"]:.0f} s' if 'seconds' in row else '-'
    metrics = ', '.join(
        f'{k.split("/")[-1]} {v:.3g}' for k, v in (row.get('metrics') or {}).items()
    )
    path = Path(row['config'])
    name = '/'.join(filter(None, (path.parent.name, path.stem)))
    return [name, loss, memory, seconds, metrics or '-', find_fault(row) or 'right']


def as_markdown(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The table of the runs so far, in the order of the command line."""
    order = sorted(rows, key=lambda row: args.configs.index(row['config']))
    lines = [
        '| config | loss | memory | time | metrics | |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    lines += [f'| {" | ".join(cells(row))} |' for row in order]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    dtype = 'bfloat16' if torch.cuda.is_available() and not args.float32 else 'float32'
    return '\n'.join(
        [
            f'{args.iterations} iterations on {args.images} images, {args.jobs} configs at a time, '
            f'{dtype}, {device}, PyTorch {torch.__version__}. Loss: means of the first and of the '
            f'last {MEAN_OF} iterations.',
            '',
            *lines,
            '',
        ]
    )


def run_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows as they are done."""
    with ThreadPoolExecutor(args.jobs) as threads:
        futures = [threads.submit(try_alone, args, name) for name in args.configs]
        for future in as_completed(futures):
            yield future.result()


def main() -> None:
    """Prints a line for each config when it is done; writes the files anew each time."""
    args = parse_args()
    least = WARM_UP + 2 * MEAN_OF
    if args.iterations < least:
        raise ValueError(f'--iterations must be at least {least}, got {args.iterations}')
    if args.jobs < 1 or args.images < 1:
        raise ValueError(f'--jobs and --images must be at least 1, got {args.jobs}, {args.images}')
    if args.timeout <= 0:
        raise ValueError(f'--timeout must be positive, got {args.timeout}')
    rows = []
    for row in run_all(args):
        rows.append(row)
        print('  '.join(cells(row)), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(dict(vars(args), rows=rows), indent=1))
        if args.markdown:
            Path(args.markdown).write_text(as_markdown(args, rows))
    failed = sum(find_fault(row) is not None for row in rows)
    print(f'{len(rows) - failed} of {len(rows)} trained and were evaluated')
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    cli.run(main)
