"""Time and memory of whole networks beside what users would pick instead.

`python tools/benchmark_model.py vig-t-adapter vit-t-adapter swin-t --shapes 800x1344 \\
    --batch-sizes 2 --steps forward training --forms eager graph`
"""

import argparse
import datetime
import itertools
import json
import multiprocessing
from pathlib import Path

import cli
import torch
from benchmarks import network_report as report
from benchmarks.network_figures import Figures, measure
from benchmarks.network_forms import FORMS, PRECISIONS, STEPS, Case
from benchmarks.networks import Network, catalog, from_config, make
from mmengine.config import DictAction

from mmvig.analysis import count_backbone

FIGURE_4 = ['224x224', '512x512', '1024x1024', '2048x2048', '4096x4096']


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description='Time and memory of whole networks, alone or beside others in the same run. '
        'Outputs, and in training gradients, are compared with the eager network in float32 '
        'before anything is timed; images of more than a megapixel, where that takes long, are '
        'checked for finite outputs.',
        epilog=f'Networks with a name: {", ".join(catalog())}.',
    )
    parser.add_argument(
        'networks', nargs='+', metavar='NETWORK', help='names, or config files: their backbones'
    )
    parser.add_argument(
        '--shapes',
        nargs='+',
        default=['512x512', '1024x1024', '800x1344', '2048x2048'],
        metavar='HxW',
        help='image heights and widths in pixels',
    )
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1], metavar='N')
    parser.add_argument('--steps', nargs='+', choices=STEPS, default=['forward'])
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=['eager'])
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        help='autocast: bfloat16 products, float32 weights (default on a GPU); bfloat16: weights, '
        'too; float32 (default on a CPU)',
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--figure4',
        metavar='FILE',
        help="draw the paper's Figure 4, multiply-adds, memory and time against resolution; "
        f'--shapes are then {" ".join(FIGURE_4)}',
    )
    parser.add_argument('--json', metavar='FILE', help='write the figures here')
    parser.add_argument('--markdown', metavar='FILE', help='write tables here')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='settings that override the configs'
    )
    args = parser.parse_args()
    if args.figure4:
        args.shapes = FIGURE_4
    if args.precision is None:
        args.precision = 'float32' if args.device == 'cpu' else 'autocast'
    return args


def find_networks(args: argparse.Namespace) -> list[Network]:
    """The networks that the arguments name.

    Raises:
        ValueError: If one is neither a name nor a file.
    """
    known = catalog()
    networks = []
    for name in args.networks:
        if name in known:
            networks.append(known[name])
        elif Path(name).is_file():
            networks.append(from_config(name, args.cfg_options))
        else:
            raise ValueError(f'{name} is no config file, and none of {", ".join(known)}')
    return networks


def parse_shape(text: str) -> tuple[int, int]:
    """Height and width from HxW.

    Raises:
        ValueError: If the text has another form.
    """
    height, _, width = text.partition('x')
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f'--shapes are heights and widths such as 800x1344, got {text}')
    return int(height), int(width)


def measure_alone(name: str, args: argparse.Namespace, case: Case) -> Figures:
    """`measure` in a process of its own, so that none inherits another's resident memory."""
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_measure_named, (name, args, case))


def _measure_named(name: str, args: argparse.Namespace, case: Case) -> Figures:
    (network,) = find_networks(argparse.Namespace(**{**vars(args), 'networks': [name]}))
    return measure(network, case, args.device)


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    name = 'CPU' if device == 'cpu' else torch.cuda.get_device_name(device)
    return {
        'device': name,
        'torch': torch.__version__,
        'cuda': str(torch.version.cuda),
        'date': datetime.date.today().isoformat(),
    }


def main() -> None:
    """Measures every network in every case, largest images last."""
    args = parse_args()
    networks = find_networks(args)
    shapes = [parse_shape(shape) for shape in args.shapes]
    for file in filter(None, (args.json, args.markdown, args.figure4)):
        cli.check_writable(Path(file).parent)
    print(report.HEADER)
    rows = []
    settings = itertools.product(args.steps, shapes, args.batch_sizes, networks, args.forms)
    for step, (height, width), batch, network, form in settings:
        case = Case(height, width, batch, step, form, args.precision)
        if args.device == 'cpu':
            rows.append(measure_alone(network.name, args, case))
        else:
            rows.append(measure(network, case, args.device))
        print(report.line(rows[-1]), flush=True)
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()), args.precision, sep=', ')
    if args.markdown:
        Path(args.markdown).write_text(report.markdown(rows) + '\n')
    if args.figure4:
        macs = {
            (network.name, *shape): count_backbone(make(network, 'cpu'), *shape).total('everything')
            for network, shape in itertools.product(networks, shapes)
        }
        report.plot(rows, {k: v / 1e9 for k, v in macs.items()}, args.figure4)
    if args.json:
        record = {
            **machine(args.device),
            'precision': args.precision,
            'rows': [row.as_dict() for row in rows],
        }
        Path(args.json).write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    cli.run(main)
