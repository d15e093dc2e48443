"""Runs a file of kernel tests on the CPU, in a process of its own under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(path: Path) -> None:
    """Fails if a test of the file fails or is skipped.

    `TRITON_INTERPRET` counts only if set before Triton is imported, hence the process.
    """
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', str(path)]
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert 'passed' in result.stdout
    assert 'skipped' not in result.stdout
