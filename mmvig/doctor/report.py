"""Checks every GPU kernel on this machine against float64 and prints a table.

Exits with 1 if one is wrong, 0 if all are right or there is no CUDA device. Nearly all of the time
goes into compiling, in as many processes as there are cores; Triton keeps what it compiled.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import time

import torch

from mmvig.doctor.processes import Processes, Result

# Each has NAME, COLUMNS, cases(quick) and check(case). What takes longest to compile comes first,
# here and among the cases, so that none is waited for at the end.
MODULES = ('mmvig.doctor.bigla', 'mmvig.doctor.ms_deform_attn', 'mmvig.doctor.block')
# With the names that OneDL's builds of the OpenMMLab packages go by.
PACKAGES = {
    'torch': ('torch',),
    'triton': ('triton',),
    'torchvision': ('torchvision',),
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
}
MAX_WORKERS = 16
NAME_WIDTH = 48


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog='python -m mmvig.doctor', description=__doc__)
    parser.add_argument('--quick', action='store_true', help="only the published networks' sizes")
    return parser.parse_args()


def versions() -> dict[str, str]:
    """Of Python, the packages that matter, and the GPU."""
    found = {'python': platform.python_version()}
    for name, aliases in PACKAGES.items():
        found[name] = next(filter(None, map(_version, aliases)), 'not installed')
    found['CUDA'] = torch.version.cuda or 'not in this PyTorch'
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found['GPU'] = f'{torch.cuda.get_device_name()}, compute capability {major}.{minor}'
    else:
        found['GPU'] = 'none'
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(name: str, result: Result) -> bool:
    """Prints a row; whether it is right."""
    if isinstance(result, str):
        print(f'{name:<{NAME_WIDTH}}{result}   WRONG', flush=True)
        return False
    errors, allowed = result
    right = all(e <= allowed for e in errors)
    cells = ''.join(f'{e:>9.1e}' for e in errors)
    verdict = 'right' if right else 'WRONG'
    print(f'{name:<{NAME_WIDTH}}{cells}{allowed:>9.1e}   {verdict}', flush=True)
    return right


def print_heading(module: str) -> None:
    """The first line of a module's table."""
    op = importlib.import_module(module)
    cells = ''.join(f'{c:>9}' for c in (*op.COLUMNS, 'allowed'))
    print(f'\n{op.NAME + ": error of":<{NAME_WIDTH}}{cells}', flush=True)


def print_versions() -> None:
    """A line for each."""
    for name, version in versions().items():
        print(f'{name:<16}{version}', flush=True)


def check_all(quick: bool) -> bool:
    """Prints a row for each case, as soon as those before it are known; whether all are right.

    Args:
        quick: Only the published networks' sizes.
    """
    start = time.monotonic()
    jobs = [(m, case) for m in MODULES for case in importlib.import_module(m).cases(quick)]
    workers = min(MAX_WORKERS, os.cpu_count() or 1, len(jobs))
    wrong, table = 0, None
    with Processes(workers) as processes:
        results = processes.map(jobs)
        print_versions()
        print(
            f'\n{len(jobs)} cases, {workers} at a time. Their kernels are compiled first: '
            f'{"some" if quick else "two or more"} minutes of all cores the first time, rows come '
            'in order.',
            flush=True,
        )
        for (module, case), result in zip(jobs, results, strict=True):
            if module != table:
                table = module
                print_heading(module)
            wrong += not report(str(case), result)
    verdict = f'{wrong} cases are WRONG on this machine' if wrong else 'All kernels are right'
    print(f'\n{verdict} ({time.monotonic() - start:.0f} s).')
    return not wrong


def main() -> int:
    """Prints versions and tables; the exit code."""
    args = parse_args()
    if torch.cuda.is_available():
        return 0 if check_all(args.quick) else 1
    print_versions()
    print('\nNo CUDA device: the operators take their PyTorch paths, nothing to check.')
    return 0
