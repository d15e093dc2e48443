"""Trains a detection or segmentation config: `python tools/train.py CONFIG`."""

import argparse

import cli
import torch
from checkpoints import check_fits, load_state_dict
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from mmvig.datasets import check_data


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description='Train a detector or a segmentor.')
    cli.add_config_arguments(parser)
    cli.add_runner_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or from the last one in the work dir where none is given',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision: bfloat16 on GPUs that have it, else float16; float32 on a CPU',
    )
    cli.add_compile_argument(parser)
    parser.add_argument(
        '--cuda-graph',
        action='store_true',
        help='run the backbone as CUDA graphs, forward and backward, two for each input size from '
        'its second batch on; without a GPU as usual',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the batch size over the config's base batch size",
    )
    return parser.parse_args()


def set_precision(cfg: Config, amp: bool) -> str | None:
    """Switches mixed precision on where it is asked for, and off where it cannot run.

    Args:
        cfg: The config, changed in place.
        amp: Whether mixed precision is wanted even where the config does not say so.

    Returns:
        What to tell the user, if anything.

    Raises:
        ValueError: If the config's optimizer wrapper has no mixed-precision form.
    """
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        if amp:
            raise ValueError(f"--amp needs optim_wrapper.type='OptimWrapper' but got '{kind}'")
        return None
    if not torch.cuda.is_available():
        if kind == 'OptimWrapper' and not amp:
            return None
        wrapper.type = 'OptimWrapper'
        for key in ('dtype', 'loss_scale', 'use_fsdp'):
            wrapper.pop(key, None)
        return 'mixed precision needs a GPU and there is none: training in float32'
    if kind == 'OptimWrapper' and amp:
        wrapper.type = 'AmpOptimWrapper'
        # bfloat16 has float32's range and needs no loss scale, whose check waits for the GPU;
        # GPUs before Ampere lack it.
        bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
        wrapper.dtype, wrapper.loss_scale = (
            ('bfloat16', dict(enabled=False)) if bfloat16 else ('float16', 'dynamic')
        )
    return None


def enable_lr_scaling(cfg: Config) -> None:
    """Turns on mmengine's scaling of the learning rate.

    Raises:
        ValueError: If the config does not say which batch size its learning rate is for.
    """
    if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
        raise ValueError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
    cfg.auto_scale_lr.enable = True


def main() -> None:
    """Builds the config's runner and trains."""
    args = parse_args()
    cfg = cli.load_runner_config(args)
    note = set_precision(cfg, args.amp)
    if args.compile:
        cli.add_hook(cfg, type='CompileBackboneHook', mode=args.compile)
    if args.cuda_graph:
        cli.add_hook(cfg, type='CudaGraphHook', training=True, max_graphs=32)
    if args.auto_scale_lr:
        enable_lr_scaling(cfg)
    check_data(cfg, ['train_dataloader', 'val_dataloader'])
    checkpoint = cfg.get('load_from')
    if args.resume:
        checkpoint = args.resume if args.resume != 'auto' else find_latest_checkpoint(cfg.work_dir)
        cfg.resume, cfg.load_from = True, checkpoint
    weights = load_state_dict(checkpoint) if args.resume and checkpoint else None

    runner = cli.build_runner(cfg)
    if note:
        runner.logger.warning(note)
    if weights:
        check_fits(runner.model, weights, checkpoint)
    # The backward pass in this thread: a process has one GPU, and the thread that PyTorch starts
    # for it enters Python anew for every operator that is written in Python, at 0.1 ms each.
    torch.autograd.set_multithreading_enabled(False)
    runner.train()


if __name__ == '__main__':
    cli.run(main)
