"""Time and memory of whole training steps, loader to optimizer, of configs side by side.

`python tools/benchmark_train_step.py configs/detection/vig_t_maskrcnn.py \
    mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --data-root data/coco100/ --parts`
"""

import argparse
import collections
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cli
import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.runner import Runner
from short_runs import innermost_dataset, leave_no_trace, take_bfloat16
from torch.profiler import ProfilerActivity, profile

PART_STEPS = 5  # of each instrumented pass
# The modules of a two-stage detector, and the methods that are timed; time inside another of these
# counts there alone. Parts that a model does not have are left out.
PARTS = {
    'preprocess': ('data_preprocessor', 'forward'),
    'backbone': ('backbone', 'forward'),
    'neck': ('neck', 'forward'),
    'copy of samples': ('', 'loss'),
    'RPN': ('rpn_head', 'forward'),
    'RPN losses': ('rpn_head', 'loss_by_feat'),
    'proposals': ('rpn_head', 'predict_by_feat'),
    'sampling': ('roi_head', 'loss'),
    'box RoIAlign': ('roi_head.bbox_roi_extractor', 'forward'),
    'box head': ('roi_head.bbox_head', 'forward'),
    'box losses': ('roi_head.bbox_head', 'loss_and_target'),
    'mask RoIAlign': ('roi_head.mask_roi_extractor', 'forward'),
    'mask head': ('roi_head.mask_head', 'forward'),
    'mask loss': ('roi_head.mask_head', 'loss_and_target'),
    'mask targets': ('roi_head.mask_head', 'get_targets'),
}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description='Time and memory of training steps.')
    parser.add_argument('configs', nargs='+', help="config files, or names of mmdet's: mmdet::...")
    parser.add_argument('--data-root', help="of the training data (default: the config's)")
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--workers', type=int, default=8, help='of the loader')
    parser.add_argument('--warmup', type=int, default=20, help='steps before the timed ones')
    parser.add_argument('--steps', type=int, default=30, help='timed steps')
    parser.add_argument('--parts', action='store_true', help='split the step, and count GPU time')
    parser.add_argument(
        '--our-heads',
        action='store_true',
        help="give mmdet's Mask R-CNN configs the heads, masks, loader, hook of losses and fused "
        "optimizer of this project's",
    )
    parser.add_argument(
        '--cuda-graph',
        action='store_true',
        help='run all backbones as CUDA graphs; sizes that come up for the first or second time '
        'in the timed steps take longer: raise --warmup',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='for every config')
    parser.add_argument('--json', metavar='FILE', help='write the figures here, too')
    return parser.parse_args()


def load_config(args: argparse.Namespace, name: str) -> Config:
    """A config that only trains: random weights, no evaluation, bfloat16 on a GPU.

    Raises:
        ValueError: If the config has no training data.
    """
    cfg = get_config(name) if '::' in name else Config.fromfile(name)
    if 'train_dataloader' not in cfg:
        raise ValueError(f'{name} has no train_dataloader')
    if args.our_heads:
        use_our_heads(cfg)
    loader = cfg.train_dataloader
    loader.update(
        batch_size=args.batch_size,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        # no end of an epoch, where the workers start anew, within the few steps of a small set
        sampler=dict(type='InfiniteSampler', shuffle=True),
    )
    if args.data_root:
        innermost_dataset(cfg).data_root = args.data_root
    take_bfloat16(cfg)
    if args.cuda_graph:
        cli.add_hook(cfg, type='CudaGraphHook', training=True, max_graphs=32)
    for stage in ('val', 'test'):
        for key in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'{stage}_{key}'] = None
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500)]
    leave_no_trace(cfg)
    cfg.merge_from_dict(args.cfg_options or {})
    return cfg


def use_our_heads(cfg: Config) -> None:
    """Replaces what `configs/detection/_base_` replaces of mmdet's Mask R-CNN, and nothing else.

    Raises:
        ValueError: If the config is no Mask R-CNN.
    """
    model = cfg.model
    if model.type != 'MaskRCNN':
        raise ValueError(f'--our-heads takes Mask R-CNN configs, got a {model.type}')
    heads = model.roi_head
    model.rpn_head.type, heads.type = 'BatchedRPNHead', 'BatchedRoIHead'
    heads.mask_head.type = 'PackedMaskHead'
    if heads.bbox_head.type == 'Shared2FCBBoxHead':
        heads.bbox_head.type = 'BatchedBBoxHead'
    for head in (model.rpn_head, heads.bbox_head):
        if head.bbox_coder.type == 'DeltaXYWHBBoxCoder':
            head.bbox_coder.type = 'AsyncDeltaXYWHBBoxCoder'
    heads.bbox_roi_extractor.type = heads.mask_roi_extractor.type = 'Float32RoIExtractor'
    model.data_preprocessor.type = 'AsyncDetDataPreprocessor'
    cfg.train_dataloader.pin_memory = True
    cfg.train_dataloader.collate_fn = dict(type='one_buffer_collate')
    hooks = dict(early_losses=dict(type='EarlyLossHook'))
    cfg.default_hooks = {**cfg.get('default_hooks', {}), **hooks}
    optimizer = cfg.optim_wrapper.optimizer
    if optimizer.type == 'AdamW':
        optimizer.type = 'FusedAdamW'
    elif optimizer.type == 'SGD':
        optimizer.fused = True
    pipeline = innermost_dataset(cfg).pipeline
    if not any(step['type'] == 'PackMasks' for step in pipeline):
        pipeline.insert(-1, dict(type='PackMasks'))


class StepClock(Hook):
    """Notes when steps end and how long they waited for data; the first hook and the last."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.after: dict[int, Callable[[], None]] = {}

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Called when the batch is there."""
        if self.ends:
            self.waits.append(time.perf_counter() - self.ends[-1])

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Called when the step is logged; the device may still be at its backward pass."""
        self.after.get(len(self.ends) + 1, lambda: None)()
        self.ends.append(time.perf_counter())


class PartClock:
    """Times parts of a step by waiting for the device before and after each."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self._children: list[float] = []
        self._wrapped: list[tuple[object, str]] = []

    def wrap(self, name: str, owner: object, method: str) -> None:
        """Replaces a method of an object by one that is timed."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wait_for_device()
            start = time.perf_counter()
            self._children.append(0.0)
            try:
                return original(*args, **kwargs)
            finally:
                wait_for_device()
                spent = time.perf_counter() - start
                self.seconds[name] += spent - self._children.pop()
                if self._children:
                    self._children[-1] += spent

        setattr(owner, method, timed)
        self._wrapped.append((owner, method))

    def wrap_runner(self, runner: Runner) -> None:
        """Wraps the parts of a runner's model and its optimizer."""
        for name, (path, method) in PARTS.items():
            owner = runner.model
            for attribute in filter(None, path.split('.')):
                owner = getattr(owner, attribute, None)
            if hasattr(owner, method):
                self.wrap(name, owner, method)
        self.wrap('backward', runner.optim_wrapper, 'backward')
        self.wrap('optimizer', runner.optim_wrapper, 'step')

    def unwrap(self) -> None:
        """Puts the methods back."""
        for owner, method in self._wrapped:
            delattr(owner, method)


def wait_for_device() -> None:
    """Waits for what the GPU has to do, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def busy_ms(recording: profile) -> float:
    """Milliseconds in which the GPU worked on something."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recording.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, last = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy / 1e3


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Trains for some steps; returns their figures, in milliseconds and GiB."""
    cfg = load_config(args, name)
    first, last = args.warmup, args.warmup + args.steps
    on_gpu = torch.cuda.is_available()
    total = last + PART_STEPS * args.parts * (1 + on_gpu)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=total)
    figures: dict[str, Any] = dict(config=name)
    clock, parts = StepClock(), PartClock()
    recording = profile(activities=[ProfilerActivity.CUDA]) if on_gpu and args.parts else None

    def timing_ends() -> None:
        if on_gpu:
            figures['peak_gib'] = torch.cuda.max_memory_allocated() / 2**30
        if args.parts:
            parts.wrap_runner(runner)

    def parts_end() -> None:
        parts.unwrap()
        if recording:
            recording.start()

    if on_gpu:
        clock.after[first] = torch.cuda.reset_peak_memory_stats
    clock.after[last] = timing_ends
    if args.parts:
        clock.after[last + PART_STEPS] = parts_end
    with tempfile.TemporaryDirectory() as work_dir:
        cfg.work_dir = work_dir
        runner = Runner.from_cfg(cfg)
        runner.register_hook(clock)
        torch.autograd.set_multithreading_enabled(False)  # as `tools/train.py` does
        runner.train()
    steps = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    figures.update(
        step_ms=statistics.median(steps[first - 1 : last - 1]) * 1e3,
        mean_ms=statistics.mean(steps[first - 1 : last - 1]) * 1e3,
        data_ms=statistics.median(clock.waits[first - 1 : last - 1]) * 1e3,
    )
    if recording:
        recording.stop()
        figures['gpu_ms'] = busy_ms(recording) / PART_STEPS
    if args.parts:
        figures['parts_ms'] = {n: s / PART_STEPS * 1e3 for n, s in parts.seconds.items()}
    return figures


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the figures, then the parts of every config in a column."""
    columns = ('step_ms', 'mean_ms', 'data_ms', 'gpu_ms', 'peak_gib')
    print(''.join(f'{column:>10}' for column in columns), ' config')
    for number, row in enumerate(rows, 1):
        values = [f'{row[column]:.2f}' if column in row else '-' for column in columns]
        print(''.join(f'{value:>10}' for value in values), f' {number}: {row["config"]}')
    names = dict.fromkeys(name for row in rows for name in row.get('parts_ms', ()))
    for name in names:
        values = [f'{row["parts_ms"].get(name, 0):.1f}' for row in rows]
        print(f'{name:>20}' + ''.join(f'{value:>9}' for value in values))


def main() -> None:
    """Measures each config in a process of its own, so that none inherits another's memory."""
    args = parse_args()
    if args.warmup < 1 or args.steps < 1:
        raise ValueError(f'--warmup and --steps are at least 1, got {args.warmup}, {args.steps}')
    rows = []
    for name in args.configs:
        context = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append(pool.submit(measure, args, name).result())
    print_table(rows)
    if args.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
        record = dict(vars(args), device=device, torch=torch.__version__, rows=rows)
        Path(args.json).write_text(json.dumps(record, indent=1))


if __name__ == '__main__':
    cli.run(main)
