"""The backward of `bidirectional_gla` by chunks against float64, on a GPU or interpreted.

Sees the same inputs as `test_bigla_kernels.py`; `test_bigla_bwd.py` runs this file under Triton's
interpreter.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from .test_bigla_kernels import (
    GATES,
    GPU,
    NAMES,
    TOLERANCE,
    check_into,
    expect,
    make_inputs,
)
from .test_bigla_kernels import _poison as _poison  # a fixture

from mmvig.kernels.bigla_bwd_chunks import backward_by_chunks, half_bits, segment_length  # isort: skip

# What the kernels take on a GPU; the interpreter has no bfloat16, and is slow.
DTYPES = [torch.bfloat16] if GPU else [torch.float32, torch.float16]
KEY, VALUE = (32, 64) if GPU else (16, 32)
TOKENS = [1, 63, 64, 196, 1000] if GPU else [1, 16, 33]
CHUNK = None if GPU else 16
dtypes = pytest.mark.parametrize('dtype', DTYPES, ids=str)


def run(inputs: list[Tensor], chunks: int | None = 2) -> list[Tensor]:
    """The five gradients."""
    return list(backward_by_chunks(*inputs, inputs[0].shape[-1] ** -0.5, CHUNK, chunks))


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Every gradient has a small relative error; what is nearly zero, a small absolute one."""
    for name, x, y in zip(NAMES[1:], actual, expected, strict=True):
        floor = 0.25 * y.numel() ** 0.5
        error = ((x.cpu().double() - y).norm() / y.norm().clamp_min(floor)).item()
        assert error < TOLERANCE[dtype], f'{name}: {error:.2e}'


@dtypes
@pytest.mark.parametrize('tokens', TOKENS)
def test_matches_the_definition(tokens: int, dtype: torch.dtype) -> None:
    inputs = make_inputs((1, tokens, 2, KEY), VALUE, 'network', dtype)
    assert_close(run(inputs), expect(inputs)[1:], dtype)


@pytest.mark.parametrize('kind', GATES)
def test_any_gates(kind: str) -> None:
    inputs = make_inputs((1, TOKENS[-1], 1, KEY), VALUE, kind, DTYPES[0])
    assert_close(run(inputs), expect(inputs)[1:], DTYPES[0])


@pytest.mark.parametrize('chunks', [None, 1, 3, 100])
def test_any_segment_length(chunks: int | None) -> None:
    inputs = make_inputs((2, 500 if GPU else 90, 1, KEY), VALUE, 'network', DTYPES[0])
    assert_close(run(inputs, chunks), expect(inputs)[1:], DTYPES[0])


@pytest.mark.parametrize(('weak', 'strong'), [(40, 10), (10, 40)])
def test_strong_chunks_among_weak_ones(weak: int, strong: int) -> None:
    """Each chunk takes the form that its own gates need."""
    scale = 8 if GPU else 1
    parts = [
        make_inputs((1, n * scale, 2, KEY), VALUE, kind, DTYPES[0])
        for n, kind in ((weak, 'network'), (strong, 'alternating'), (weak, 'zero'))
    ]
    inputs = [torch.cat(xs, 1) for xs in zip(*parts, strict=True)]
    assert_close(run(inputs), expect(inputs)[1:], DTYPES[0])


@pytest.mark.skipif(GPU, reason='taken by the other form on a GPU')
@pytest.mark.parametrize(('key', 'value'), [(32, 64), (24, 40), (16, 96)])
def test_any_head_dims(key: int, value: int) -> None:
    inputs = make_inputs((1, 40, 1, key), value, 'network', torch.float32)
    assert_close(run(inputs), expect(inputs)[1:], torch.float32)


def test_views_of_one_projection() -> None:
    qkv = make_inputs((2, 50, 2, 2 * KEY + VALUE), VALUE, 'network', DTYPES[0])[0]
    inputs = make_inputs((2, 50, 2, KEY), VALUE, 'network', DTYPES[0])
    inputs[:3] = qkv.split([KEY, KEY, VALUE], -1)
    assert_close(run(inputs), expect(inputs)[1:], DTYPES[0])


def test_gradients_next_to_each_other() -> None:
    inputs = make_inputs((2, 40, 2, KEY), VALUE, 'network', DTYPES[0])
    check_into(inputs, partial(backward_by_chunks, chunk=CHUNK, chunks=2))


@dtypes
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    inputs = make_inputs((1, 75, 2, KEY), VALUE, 'network', dtype)
    for x, y in zip(run(inputs), run(inputs), strict=True):
        assert torch.equal(x, y)


def test_strongest_decay_of_each_segment() -> None:
    totals = -torch.rand(3, 7, 2, 5)
    for chunks in (1, 2, 3, 7, 100):
        expected = [x.flatten(1).amin(1) / 2 for x in totals.split(chunks, 1)]
        torch.testing.assert_close(half_bits(totals, chunks), torch.stack(expected, 1))


@pytest.mark.parametrize('n_chunks', [1, 4, 16, 66, 1024])
@pytest.mark.parametrize('heads', [1, 24, 3072])
def test_segments_fill_the_device(n_chunks: int, heads: int) -> None:
    chunks = segment_length(n_chunks, heads, 132)
    assert 1 <= chunks <= n_chunks
    programs = 4 * heads * -(-n_chunks // chunks)
    assert programs >= min(132, 4 * heads * n_chunks)
