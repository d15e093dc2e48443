"""Time and memory of a config's backbone against image size, on a CPU or a GPU.

`python tools/benchmark_model.py configs/detection/vig_t_maskrcnn.py --shapes 512x512 2048x2048`
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cli
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description='Time and memory of a backbone by image size.')
    cli.add_config_arguments(parser)
    parser.add_argument(
        '--shapes',
        nargs='+',
        default=['512x512', '1024x1024', '800x1344', '2048x2048'],
        metavar='HxW',
        help='image heights and widths in pixels',
    )
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--train', action='store_true', help='forward and backward, else forward')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--repeat', type=int, default=5, help='timed runs; the median is stated')
    parser.add_argument('--json', metavar='FILE', help='write the figures here, too')
    return parser.parse_args()


def build_backbone(args: argparse.Namespace) -> nn.Module:
    """The config's backbone with random weights."""
    cfg = cli.load_config(args)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model.backbone).to(args.device).train(args.train)


def make_step(args: argparse.Namespace, height: int, width: int) -> Callable[[], None]:
    """A function that runs the backbone once on one random batch."""
    backbone = build_backbone(args)
    images = torch.randn(args.batch_size, 3, height, width, device=args.device)

    def step() -> None:
        with (
            torch.set_grad_enabled(args.train),
            torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp),
        ):
            loss = sum(out.float().mean() for out in backbone(images))
        if args.train:
            backbone.zero_grad(set_to_none=True)
            loss.backward()
        if not loss.isfinite():  # waits for the device, too
            raise RuntimeError(f'the backbone returned {loss.item()} at {height}x{width}')

    return step


def measure(args: argparse.Namespace, height: int, width: int) -> dict[str, float]:
    """Median seconds of a run, and peak memory in GiB: allocated on a GPU, resident on a CPU."""
    step = make_step(args, height, width)
    step()  # allocates, compiles kernels, resizes position embeddings
    seconds = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if args.device == 'cpu':
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    else:
        peak = torch.cuda.max_memory_allocated(args.device) / 2**30
    return dict(
        height=height,
        width=width,
        seconds=statistics.median(seconds),
        seconds_per_megapixel=statistics.median(seconds) / (args.batch_size * height * width / 1e6),
        peak_gib=peak,
    )


def main() -> None:
    """Measures each shape in a process of its own, so that none inherits another's memory."""
    args = parse_args()
    shapes = [tuple(int(side) for side in shape.split('x')) for shape in args.shapes]
    device = 'CPU' if args.device == 'cpu' else torch.cuda.get_device_name(args.device)
    what = 'forward + backward' if args.train else 'forward'
    print(f'{args.config}, backbone, {what}, batch {args.batch_size}, {device}')
    print(f'{"image":>12} {"ms":>10} {"ms per Mpx":>11} {"peak GiB":>9}')
    rows = []
    for height, width in shapes:
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            row = pool.apply(measure, (args, height, width))
        rows.append(row)
        print(
            f'{height:>6}x{width:<5} {row["seconds"] * 1e3:>10.1f} '
            f'{row["seconds_per_megapixel"] * 1e3:>11.1f} {row["peak_gib"]:>9.2f}',
            flush=True,
        )
    if args.json:
        record = dict(vars(args), device_name=device, torch=torch.__version__, rows=rows)
        Path(args.json).write_text(json.dumps(record, indent=1))


if __name__ == '__main__':
    cli.run(main)
