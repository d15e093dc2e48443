"""What the tools share: arguments, the way from them to a runner, and one-line errors."""

import argparse
import linecache
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import allow_mmengine_checkpoints
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mmvig  # noqa: F401  (before mmdet and mmseg: it answers for mmcv's compiled operators)
from mmvig.engine import check_channels
from mmvig.engine.backbones import MODES

TOOL_MODULES = ('__main__', 'cli', 'checkpoints')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and `--cfg-options`."""
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings that override the config, as key=value with dots in the key, such as '
        'train_dataloader.batch_size=1; lists as key="[a,b]" or key=a,b',
    )


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what training and testing have in common: work dir and launcher."""
    parser.add_argument(
        '--work-dir', help="where logs and results go (default: work_dirs/<the config's name>)"
    )
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    # torch.distributed.launch passes the rank as an argument; torchrun sets it by itself.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_compile_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--compile`."""
    parser.add_argument(
        '--compile',
        nargs='?',
        const='default',
        choices=MODES,
        metavar='MODE',
        help='compile the backbone, and nothing else, with torch.compile; the mode is one of '
        f'{", ".join(MODES)}',
    )


def add_prefix_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--prefix`, of names in a checkpoint."""
    parser.add_argument(
        '--prefix',
        default='',
        help="take the names that start with it alone, without it, as init_cfg's prefix does",
    )


def add_hook(cfg: Config, **hook: object) -> None:
    """Appends a hook to the config's own; a config that has one of that type keeps it."""
    hooks = cfg.get('custom_hooks') or []
    if hook['type'] not in [h['type'] for h in hooks]:
        cfg.custom_hooks = [*hooks, hook]


def load_config(args: argparse.Namespace) -> Config:
    """Loads `args.config` with `args.cfg_options` applied.

    Raises:
        FileNotFoundError: If the config is no file.
    """
    if not Path(args.config).is_file():
        raise FileNotFoundError(f'config {args.config} is not a file')
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def load_runner_config(args: argparse.Namespace) -> Config:
    """`load_config`, with work dir and launcher from the arguments; writes nothing.

    Raises:
        FileNotFoundError: If the config is no file.
    """
    cfg = load_config(args)
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    )
    return cfg


def check_writable(folder: str | Path) -> None:
    """Creates a folder where it is missing.

    Raises:
        ValueError: If it cannot be created, or nothing can be written in it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f'cannot write to {folder}: {error.strerror}; name another folder'
        ) from error


def build_runner(cfg: Config) -> Runner:
    """Builds the config's runner; several processes may share a CPU, too.

    Raises:
        ValueError: If nothing can be written in the work dir, or the model refuses its settings, or
            neck or heads take other channels than the backbone gives.
    """
    check_writable(cfg.work_dir)
    allow_mmengine_checkpoints()
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        # mmengine's launcher insists on CUDA, but takes a process group that is there already.
        dist.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
        )
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    check_channels(runner.model)
    return runner


def run(main: Callable[[], None]) -> None:
    """Runs a tool; a mistake of its user's ends it with one line and exit status 2.

    mmvig and its tools raise ValueError and OSError for such mistakes alone, with a message that
    suffices. What another package raises, or Python itself, keeps its traceback.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if not _raised_by_mmvig(error):
            raise
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)


def _raised_by_mmvig(error: BaseException) -> bool:
    """Whether a `raise` statement of this project's raised the error."""
    *_, (frame, line_number) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals['__name__'].partition('.')[0]
    line = linecache.getline(frame.f_code.co_filename, line_number)
    return package in ('mmvig', *TOOL_MODULES) and line.lstrip().startswith('raise ')
