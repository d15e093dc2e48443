"""Checks of `bidirectional_gla`: every dtype and block size, output and all five gradients."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmvig.kernels import bigla_trust

NAME = 'bidirectional_gla'
COLUMNS = bigla_trust.NAMES
KEY_DIMS = (16, 32, 64, 128)
VALUE_DIMS = (32, 64, 96, 128)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    dtype: torch.dtype
    gate_dtype: torch.dtype
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        gates = '' if self.gate_dtype == self.dtype else f', {_short(self.gate_dtype)} gates'
        return f'{_short(self.dtype)}, {self.key_dim} to {self.value_dim}{gates}'


def cases(quick: bool) -> Iterator[Case]:
    """All that the kernels accept; the networks' own dims if `quick`."""
    dims = [(k, v) for k in KEY_DIMS for v in VALUE_DIMS]
    for dtype, gate_dtype in ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)):
        for k, v in [(32, 64), (16, 32)] if quick else dims:
            yield Case(dtype, gate_dtype, k, v)


def check(case: Case) -> tuple[list[float], float]:
    """Largest error of each column, and what is allowed; runs on the current CUDA device."""
    worst: dict[str, float] = {}
    for n, gate, chunks in bigla_trust.CASES:
        args = bigla_trust.draw(
            1, n, 2, case.key_dim, case.value_dim, gate, case.dtype, case.gate_dtype,
            torch.device('cuda'),
        )  # fmt: skip
        for name, error in bigla_trust.measure(args, chunks).items():
            # max() would lose a NaN.
            worst[name] = error if not error <= worst.get(name, 0) else worst[name]
    return [worst[name] for name in COLUMNS], bigla_trust.TOLERANCE[case.dtype]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
