"""Kernel tests on the CPU: in a process of their own, under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = 'cuda' if GPU else 'cpu'


def skip_without_kernels() -> None:
    """Skips the module that calls this where kernels run neither on a GPU nor interpreted."""
    if importlib.util.find_spec('triton') is None:
        pytest.skip('needs Triton', allow_module_level=True)
    if not (GPU or INTERPRETED):
        pytest.skip('needs a CUDA device or TRITON_INTERPRET=1', allow_module_level=True)


def run_interpreted(path: Path) -> None:
    """Fails if a test of the file fails or is skipped.

    `TRITON_INTERPRET` counts only if set before Triton is imported, hence the process.
    """
    import triton

    # 3.6 was seen to fail at every loop, 3.8 not; those between were not looked at
    if TorchVersion(triton.__version__) < '3.8' and TorchVersion(np.__version__) >= '2.4':
        pytest.skip("this Triton's interpreter does not run with NumPy 2.4 and newer")
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', str(path)]
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert 'passed' in result.stdout
    assert 'skipped' not in result.stdout
