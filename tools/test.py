"""Evaluates a detection or segmentation checkpoint: `python tools/test.py CONFIG CHECKPOINT`."""

import argparse
from pathlib import Path

import cli
from checkpoints import check_fits, load_state_dict
from mmengine.config import Config

from mmvig.datasets import check_data


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description='Test a detector or a segmentor.')
    cli.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    cli.add_runner_arguments(parser)
    parser.add_argument(
        '--out',
        help='write the predictions: to this .pkl file (detection), or as label maps to this '
        'folder (segmentation)',
    )
    parser.add_argument('--show-dir', help='draw the predictions to this folder')
    cli.add_compile_argument(parser)
    parser.add_argument(
        '--cuda-graph',
        action='store_true',
        help='run the backbone as CUDA graphs, one for each input size from its second image on; '
        'without a GPU as usual',
    )
    return parser.parse_args()


def dump_predictions(cfg: Config, out: str) -> None:
    """Has the test evaluator write its predictions to `out`.

    Raises:
        ValueError: If a detection config is to write anything but a pickle file.
    """
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if cfg.get('default_scope') == 'mmseg':
        for metric in metrics:
            if metric['type'] == 'IoUMetric':
                metric['output_dir'] = out
    elif out.endswith(('.pkl', '.pickle')):
        metrics = [*metrics, dict(type='DumpDetResults', out_file_path=out)]
    else:
        raise ValueError(f'--out of a detection config must end in .pkl, but got {out}')
    cfg.test_evaluator = metrics


def draw_predictions(cfg: Config, folder: str) -> None:
    """Has the visualization hook draw every test image to `folder`.

    Raises:
        ValueError: If the config has no such hook, or nothing can be written in the folder.
    """
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise ValueError('--show-dir needs default_hooks.visualization in the config')
    cli.check_writable(folder)
    # Absolute, because mmdet joins a relative folder to the last one at every image.
    folder = str(Path(folder).resolve())
    hook.draw = True
    if cfg.get('default_scope') == 'mmseg':
        cfg.visualizer.save_dir = folder
    else:
        hook.test_out_dir = folder


def main() -> None:
    """Builds the config's runner and tests."""
    args = parse_args()
    cfg = cli.load_runner_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    weights = load_state_dict(args.checkpoint)
    check_data(cfg, ['test_dataloader'])
    if args.out:
        dump_predictions(cfg, args.out)
    if args.show_dir:
        draw_predictions(cfg, args.show_dir)

    if args.compile:
        cli.add_hook(cfg, type='CompileBackboneHook', mode=args.compile)
    if args.cuda_graph:
        cli.add_hook(cfg, type='CudaGraphHook')
    runner = cli.build_runner(cfg)
    check_fits(runner.model, weights, args.checkpoint)
    runner.test()


if __name__ == '__main__':
    cli.run(main)
