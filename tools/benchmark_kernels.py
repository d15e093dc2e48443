"""Speed and memory of mmvig's GPU operators beside their peers; prints a table, writes JSON.

`python tools/benchmark_kernels.py bigla --json bigla.json`

Times are medians in microseconds, the L2 cache cleared before each run. A time is stated only for
an output and gradients that were checked right before; the error is the largest of those.
"""

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path
from typing import NoReturn

import torch
import triton
from benchmarks import timing

OPS = ('bigla', 'block', 'ms_deform_attn')
COLUMNS = (
    'fwd eager', 'fwd graph', 'f+b eager', 'f+b graph', 'bwd graph', 'fwd MiB', 'f+b MiB', 'error'
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description='Speed of GPU operators beside their peers.')
    parser.add_argument('op', choices=OPS)
    parser.add_argument(
        '--cases', nargs='+', metavar='CASE', help='names of cases; all if not given'
    )
    parser.add_argument('--only', nargs='+', metavar='NAME', help='contenders, all if not given')
    parser.add_argument('--json', metavar='FILE', help='write the figures here, too')
    return parser.parse_args()


def machine() -> dict[str, str]:
    """What the figures depend on."""
    return {
        'device': torch.cuda.get_device_name(),
        'torch': torch.__version__,
        'triton': triton.__version__,
        'date': datetime.date.today().isoformat(),
    }


def print_row(name: str, cells: list[str]) -> None:
    """One line of the table."""
    print(f'{name:<22}' + ''.join(f'{cell:>11}' for cell in cells), flush=True)


def print_bounds(name: str, forward: float, both: float) -> None:
    """A line with what no implementation can do without."""
    cells = [number(x) for x in (forward, both, both - forward)]
    print_row(name, ['', cells[0], '', cells[1], cells[2], '', '', ''])


def number(x: float | None, digits: int = 1) -> str:
    """A cell."""
    return '-' if x is None else f'{x:,.{digits}f}'


def fail(message: str) -> NoReturn:
    """Ends as the other tools do, whose module for that needs the mm packages."""
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Measures all contenders of all cases."""
    args = parse_args()
    if not torch.cuda.is_available():
        fail('a CUDA device is needed, and there is none')
    op = importlib.import_module(f'benchmarks.{args.op}')
    unknown = set(args.cases or ()) - set(op.CASES)
    if unknown:
        fail(f'unknown cases {sorted(unknown)}, expected some of {list(op.CASES)}')
    bandwidth = timing.copy_bandwidth()
    report = {**machine(), 'copy_bandwidth': bandwidth, 'figures': []}
    print(
        *(f'{k} {v}' for k, v in machine().items()), f'copy {bandwidth / 1e12:.2f} TB/s', sep=', '
    )
    for case in args.cases or op.CASES:
        bounds = [1e6 * size / bandwidth for size in op.traffic(case)]
        print_row(f'\n{case}', list(COLUMNS))
        print_bounds('memory bound, us', *bounds)
        l2_traffic = op.l2_traffic(case)
        if l2_traffic is not None:
            print_bounds('L2 traffic, MB', *(size / 1e6 for size in l2_traffic))
        for contender in op.contenders(case):
            if args.only and contender.name not in args.only:
                continue
            f = timing.measure(case, contender)
            times = (f.forward_eager, f.forward_graph, f.both_eager, f.both_graph, f.backward_graph)
            cells = [number(x) for x in (*times, f.forward_mib, f.both_mib)]
            print_row(f.contender, [*cells, '-' if f.error is None else f'{f.error:.1e}'])
            if f.note:
                print(f'  {f.note}')
            figures = {**f.as_dict(), 'bounds': bounds, 'l2_traffic': l2_traffic}
            report['figures'].append(figures)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
