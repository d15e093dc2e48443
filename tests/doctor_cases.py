"""What `test_doctor.py` has other processes check."""

import os

NAME = 'no operator'
COLUMNS = ('error',)


def cases(quick: bool) -> list[str]:
    return ['fine', 'wrong', 'raises'] if quick else ['ends']


def check(case: str) -> tuple[list[float], float]:
    if case == 'ends':
        os._exit(1)
    if case == 'raises':
        raise RuntimeError('CUDA error: it was told to fail\nmore')
    return [1.0 if case == 'wrong' else 0.5], 0.75
