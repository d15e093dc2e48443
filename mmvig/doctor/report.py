"""Checks every GPU kernel on this machine against float64 and prints a table.

Exits with 1 if one is wrong, 0 if all are right or there is no CUDA device.
"""

import argparse
import importlib
import importlib.metadata
import multiprocessing
import os
import platform
from typing import Any

import torch

# Modules beside this one; each has NAME, COLUMNS, cases(quick) and check(case).
OPS = ('bigla', 'ms_deform_attn', 'block')
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
# Errors of a case and what is allowed, or the exception that it raised, in a line.
Result = tuple[list[float], float] | str


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


def check_all(op: str, cases: list[Any]) -> list[Result]:
    """The results of all cases, from many processes, since compiling takes the time."""
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    spawn = multiprocessing.get_context('spawn')
    with spawn.Pool(workers) as pool:
        results = pool.starmap(check, [(op, case) for case in cases], chunksize=1)
    # A CUDA error leaves a process unusable: who else failed in it is tried again, alone.
    again = [i for i, result in enumerate(results) if isinstance(result, str) and 'CUDA' in result]
    if again:
        with spawn.Pool(workers, maxtasksperchild=1) as pool:
            retried = pool.starmap(check, [(op, cases[i]) for i in again], chunksize=1)
        for i, result in zip(again, retried, strict=True):
            results[i] = result
    return results


def check(op: str, case: Any) -> Result:
    """One case: its errors and what is allowed, or what went wrong."""
    # Fills new memory with NaN, so that what a kernel does not write is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return importlib.import_module(f'mmvig.doctor.{op}').check(case)
    except Exception as e:  # whatever a compiler or driver may raise is this check's finding
        return f'{type(e).__name__}: {str(e).strip().splitlines()[0][:100]}'


def report(name: str, result: Result) -> bool:
    """Prints a row; whether it is right."""
    if isinstance(result, str):
        print(f'{name:<36}{result}   WRONG')
        return False
    errors, allowed = result
    right = all(e <= allowed for e in errors)
    cells = ''.join(f'{e:>9.1e}' for e in errors)
    print(f'{name:<36}{cells}{allowed:>9.1e}   {"right" if right else "WRONG"}', flush=True)
    return right


def main() -> int:
    """Prints versions and tables; the exit code."""
    args = parse_args()
    for name, version in versions().items():
        print(f'{name:<16}{version}')
    if not torch.cuda.is_available():
        print('\nNo CUDA device: the operators take their PyTorch paths, nothing to check.')
        return 0
    right = True
    for op in OPS:
        module = importlib.import_module(f'mmvig.doctor.{op}')
        print(f'\n{module.NAME + ": error of":<36}', end='')
        print(''.join(f'{c:>9}' for c in (*module.COLUMNS, 'allowed')), flush=True)
        cases = list(module.cases(args.quick))
        for case, result in zip(cases, check_all(op, cases), strict=True):
            right &= report(str(case), result)
    print('\nAll kernels are right.' if right else '\nSome kernels are WRONG on this machine.')
    return 0 if right else 1
