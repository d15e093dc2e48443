"""The backward of `bidirectional_gla` in Gluon against float64.

On a GPU that has it, or its source on the CPU in float32, by `gluon_emulator.py`;
`test_bigla_bwd.py` runs this file so, under Triton's interpreter, which does the scan and the exact
form.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from .gluon_emulator import NoKernel, emulated
from .test_bigla_bwd_kernels import assert_close
from .test_bigla_kernels import GPU, check_into, expect, make_inputs
from .test_bigla_kernels import _poison as _poison  # a fixture

from mmvig.kernels import bigla_bwd  # isort: skip

if GPU:
    if not next(iter(bigla_bwd.FORMS)).available(torch.device('cuda')):
        pytest.skip('needs Hopper and the Gluon of Triton 3.6', allow_module_level=True)
    from mmvig.kernels import bigla_bwd_gluon
else:
    PARTS = ('bigla_gluon_tiles', 'bigla_bwd_gluon_states', 'bigla_bwd_gluon')
    bigla_bwd_gluon = emulated(*(f'mmvig.kernels.{part}' for part in PARTS))[-1]
DTYPE = torch.bfloat16 if GPU else torch.float32
KEY, VALUE = 32, 64


def run(inputs: list[Tensor], chunks: int | None = None) -> list[Tensor]:
    """The five gradients."""
    return list(bigla_bwd_gluon.backward_in_gluon(*inputs, KEY**-0.5, chunks))


def check(inputs: list[Tensor], chunks: int | None = None) -> None:
    assert_close(run(inputs, chunks), expect(inputs)[1:], DTYPE)


@pytest.mark.parametrize('tokens', [1, 64, 65, *((200, 1000, 4200) if GPU else ())])
def test_matches_the_definition(tokens: int) -> None:
    check(make_inputs((1, tokens, 2, KEY), VALUE, 'network', DTYPE))


@pytest.mark.parametrize('chunks', [1, 2, 100])
def test_any_segment_length(chunks: int) -> None:
    check(make_inputs((2, 200, 1, KEY), VALUE, 'network', DTYPE), chunks)


@pytest.mark.parametrize('chunks', [1, 2, 100])
def test_weak_gates_do_not_need_the_exact_form(
    chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what is not a number, too, and would hide a tile that was never copied."""
    monkeypatch.setattr(bigla_bwd_gluon, 'grad_kernel', NoKernel())
    check(make_inputs((1, 200, 1, KEY), VALUE, 'network', DTYPE), chunks)


@pytest.mark.parametrize('chunks', [1, 2, 100])
def test_strong_gates_after_weak_ones(chunks: int) -> None:
    """The exact form takes the segments that need it, and no other."""
    inputs = make_inputs((1, 130, 1, KEY), VALUE, 'network', DTYPE)
    for gate in inputs[3:5]:
        gate[:, 64:100] = -3.0
    check(inputs, chunks)


@pytest.mark.parametrize('chunks', [1, 100])
def test_views_of_one_projection(chunks: int) -> None:
    """Rows that are not contiguous, and alternate with others."""
    inputs = make_inputs((2, 70, 2, KEY), VALUE, 'network', DTYPE)
    wide = torch.cat([x.flatten(2) for x in inputs], -1)
    views = wide.split([2 * x.shape[-1] for x in inputs], -1)
    check([x.unflatten(-1, (2, -1)) for x in views], chunks)


def test_gradients_next_to_each_other() -> None:
    inputs = make_inputs((2, 70, 2, KEY), VALUE, 'network', DTYPE)
    check_into(inputs, partial(bigla_bwd_gluon.backward_in_gluon, chunks=1))


def test_same_bits_every_time() -> None:
    inputs = make_inputs((1, 75, 2, KEY), VALUE, 'network', DTYPE)
    for x, y in zip(run(inputs, 1), run(inputs, 1), strict=True):
        assert torch.equal(x, y)


def test_gradients_are_contiguous_and_in_the_dtypes_of_their_tensors() -> None:
    inputs = make_inputs((1, 66, 1, KEY), VALUE, 'zero', DTYPE)
    for x, y in zip(run(inputs), inputs, strict=False):
        assert x.is_contiguous() and x.shape == y.shape and x.dtype == y.dtype


def test_segment_length() -> None:
    length = bigla_bwd_gluon.segment_length
    assert length(1, 1, 132) == 1
    assert length(4, 3072, 132) == 4 and length(16, 48, 132) == 16
    # 1,056 programs fill 2.7 rounds of 396; with 8 chunks 864 would take as many.
    assert length(66, 24, 132) == 6
    assert length(1024, 12, 132) == 8


last_chunks = pytest.mark.parametrize(
    ('tokens', 'chunks', 'apart'),
    [(80, 2, True), (81, 2, False), (144, 2, False), (144, 3, True), (208, 2, True)],
)


@last_chunks
def test_few_tokens_in_the_last_chunk(tokens: int, chunks: int, apart: bool) -> None:
    check(make_inputs((2, tokens, 2, KEY), VALUE, 'network', DTYPE), chunks)


@last_chunks
def test_few_tokens_are_done_apart(
    tokens: int, chunks: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where the chunk is a segment of its own, or has 17 or more."""
    monkeypatch.setattr(bigla_bwd_gluon, 'tail_grads_kernel', NoKernel())
    for x in run(make_inputs((2, tokens, 2, KEY), VALUE, 'network', DTYPE), chunks):
        missing = x.isnan().flatten(2)
        last = missing[:, 64 * (tokens // 64) :]
        assert last.all() if apart else not last.any()
        assert not missing[:, : 64 * (tokens // 64)].any()
