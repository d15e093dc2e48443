"""The faster forward of `bidirectional_gla` against float64, on a GPU or interpreted.

Sees the same inputs as `test_bigla_kernels.py`; `test_bigla_fwd.py` runs this file under Triton's
interpreter.
"""

import pytest
import torch
from torch import Tensor

from .test_bigla_kernels import GATES, GPU, TOLERANCE, expect, make_inputs
from .test_bigla_kernels import _poison as _poison  # a fixture

from mmvig.kernels.bigla_fwd_edges import forward_from_edges, segment_length  # isort: skip

# What the kernels take on a GPU; the interpreter has no bfloat16, and is slow.
DTYPE = torch.bfloat16 if GPU else torch.float32
KEY, VALUE = (32, 64) if GPU else (16, 32)
TOKENS = [1, 63, 64, 65, 196, 1000] if GPU else [1, 16, 17, 33]
CHUNK = None if GPU else 16


def check(inputs: list[Tensor], chunks: int | None) -> None:
    """Compares the output for segments of so many chunks."""
    *args, _ = inputs
    found = forward_from_edges(*args, args[0].shape[-1] ** -0.5, CHUNK, chunks)
    expected = expect(inputs)[0]
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[DTYPE]
    assert found.is_contiguous()


@pytest.mark.parametrize('chunks', [1, 2, 100])
@pytest.mark.parametrize('tokens', TOKENS)
def test_matches_the_definition(tokens: int, chunks: int) -> None:
    check(make_inputs((1, tokens, 2, KEY), VALUE, 'network', DTYPE), chunks)


@pytest.mark.parametrize('chunks', [1, 2, 100])
@pytest.mark.parametrize('kind', GATES)
def test_any_gates(kind: str, chunks: int) -> None:
    check(make_inputs((1, TOKENS[-1], 1, KEY), VALUE, kind, DTYPE), chunks)


@pytest.mark.parametrize('chunks', [None, 3])
def test_any_segment_length(chunks: int | None) -> None:
    check(make_inputs((2, 500 if GPU else 90, 1, KEY), VALUE, 'network', DTYPE), chunks)


@pytest.mark.parametrize('chunks', [1, 2])
def test_strong_gates_in_some_of_many_heads(chunks: int) -> None:
    """A program of the exact form looks at several segments."""
    batch, heads = (64, 12) if GPU else (3, 5)
    inputs = make_inputs((batch, 20 if CHUNK else 100, heads, KEY), VALUE, 'network', DTYPE)
    for b, h in ((0, 1), (1, 3), (1, 4), (2, 0)):
        for gate in inputs[3:5]:
            gate[b, 3:18, h] = -20.0
    check(inputs, chunks)


def test_strided_inputs() -> None:
    inputs = make_inputs((2, TOKENS[-1], 2, KEY), VALUE, 'network', DTYPE)
    wide = [torch.cat([x, x], 2)[:, :, ::2] for x in inputs]
    check([torch.cat([x, x], -1)[..., : x.shape[-1]] for x in wide], 1)


def test_segment_length() -> None:
    assert segment_length(1, 1, 132) == 1
    assert segment_length(4, 3072, 132) == 4
    assert all(1 <= segment_length(n, h, 132) <= n for n in (1, 7, 300) for h in (1, 48))
