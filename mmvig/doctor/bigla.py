"""Checks of `bidirectional_gla`: every dtype and block size, output and all five gradients."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmvig.kernels import bigla_trust

NAME = 'bidirectional_gla'
COLUMNS = bigla_trust.NAMES
# The most expensive to compile first.
KEY_DIMS = (128, 64, 32, 16)
VALUE_DIMS = (128, 96, 64, 32)
PUBLISHED_DIMS = ((32, 64), (16, 32))
GENERAL = 'by segments'  # the backward's form that takes all inputs
MAX_CHUNK = 64  # tokens; smaller where a program could not hold more
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Sequences in several segments and in one have kernels of their own, which take as long to
    compile again. `backward` names the form of the backward where there is more than one.
    """

    dtype: torch.dtype
    gate_dtype: torch.dtype
    key_dim: int
    value_dim: int
    several: bool
    backward: str = ''

    def __str__(self) -> str:
        gates = '' if self.gate_dtype == self.dtype else f', {_short(self.gate_dtype)} gates'
        segments = 'segments' if self.several else 'one segment'
        dims = f'{self.key_dim} to {self.value_dim}'
        backward = f', {self.backward}' if self.backward else ''
        return f'{_short(self.dtype)}{gates}, {dims}, {segments}{backward}'


def cases(quick: bool) -> Iterator[Case]:
    """All forms of the kernels; the networks' own alone if `quick`."""
    for dtype, gate_dtype in ((BF16, FP32), (FP32, FP32), (FP16, FP16), (BF16, BF16)):
        if quick and gate_dtype != dtype:
            continue
        published = quick or gate_dtype != dtype
        for k, v in PUBLISHED_DIMS if published else distinct_dims(dtype):
            for form in backward_forms(dtype, gate_dtype, k, v):
                for several in (True, False):
                    yield Case(dtype, gate_dtype, k, v, several, form)


def backward_forms(dtype: torch.dtype, gate_dtype: torch.dtype, k: int, v: int) -> list[str]:
    """Every form that the backward has here for such inputs; [''] where it has one only."""
    from mmvig.kernels import bigla_bwd, bigla_forms

    own = bigla_forms.DTYPE, bigla_forms.DTYPE, bigla_forms.KEY_DIM, bigla_forms.VALUE_DIM
    if (dtype, gate_dtype, k, v) != own:
        return ['']
    return [*bigla_bwd.FORMS.available(torch.device('cuda')), GENERAL]


def distinct_dims(dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Key and value dims, without those whose code differs from another's by a constant only."""
    from mmvig.kernels.bigla_plan import make_plan

    for k in KEY_DIMS:
        seen = set()
        for v in VALUE_DIMS:
            block = make_plan(*(torch.empty(1, 1, 1, d, dtype=dtype) for d in (k, v))).block_v
            form = (block, v > block, v % block > 0)
            if form not in seen:
                seen.add(form)
                yield k, v


def check(case: Case) -> tuple[list[float], float]:
    """Largest error of each column, and what is allowed; runs on the current CUDA device."""
    if case.backward:
        take_form(case.backward)
    worst: dict[str, float] = {}
    for n, gate, chunks in settings(case):
        args = bigla_trust.draw(
            1, n, 2, case.key_dim, case.value_dim, gate, case.dtype, case.gate_dtype,
            torch.device('cuda'),
        )  # fmt: skip
        for name, error in bigla_trust.measure(args, chunks).items():
            # max() would lose a NaN.
            worst[name] = error if not error <= worst.get(name, 0) else worst[name]
    return [worst[name] for name in COLUMNS], bigla_trust.TOLERANCE[case.dtype]


def settings(case: Case) -> list[tuple[int, float, int]]:
    """Tokens, typical log gate and chunks of a segment: weak gates and strong ones."""
    if case.several:
        return [s for s in bigla_trust.CASES if s[2] * MAX_CHUNK < s[0]]
    return sorted({(n, gate, n) for n, gate, _ in bigla_trust.CASES})


def take_form(name: str) -> None:
    """Has the backward take this form unasked, and the forward that of the same rank.

    Their own checks would hide a form that is wrong behind the one that they fall back to.
    """
    from mmvig.kernels import bigla_bwd, bigla_fwd

    device = torch.device('cuda', torch.cuda.current_device())
    names = (forms.FORMS.available(device) for forms in (bigla_bwd, bigla_fwd))
    forward = dict(zip(*names, strict=True)).get(name)
    bigla_bwd.FORMS.take(None if name == GENERAL else name, device)
    bigla_fwd.FORMS.take(forward, device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
