"""The forward of `bidirectional_gla` in Gluon against float64.

On a GPU that has it, or its source on the CPU in float32, by `gluon_emulator.py`;
`test_bigla_fwd.py` runs this file so, under Triton's interpreter, which does the scan and the exact
form.
"""

import pytest
import torch
from torch import Tensor

from .gluon_emulator import emulated
from .test_bigla_kernels import GATES, GPU, TOLERANCE, expect, make_inputs
from .test_bigla_kernels import _poison as _poison  # a fixture

from mmvig.kernels import bigla_fwd  # isort: skip

if GPU:
    if not next(iter(bigla_fwd.FORMS)).available(torch.device('cuda')):
        pytest.skip('needs Hopper and the Gluon of Triton 3.6', allow_module_level=True)
    from mmvig.kernels import bigla_fwd_gluon
else:
    PARTS = ('bigla_gluon_tiles', 'bigla_fwd_gluon_adds', 'bigla_fwd_gluon')
    bigla_fwd_gluon = emulated(*(f'mmvig.kernels.{part}' for part in PARTS))[-1]
DTYPE = torch.bfloat16 if GPU else torch.float32
KEY, VALUE = 32, 64
# One segment up to 256 tokens.
TOKENS = [1, 64, 65, 196, 256, 257, *((1000, 4200) if GPU else ())]


def run(inputs: list[Tensor], chunks: int | None = None) -> Tensor:
    """The output, for segments of so many chunks."""
    return bigla_fwd_gluon.forward_in_gluon(*inputs[:5], KEY**-0.5, chunks)


def check(inputs: list[Tensor], chunks: int | None = None) -> None:
    """Compares the output with float64."""
    found = run(inputs, chunks)
    expected = expect(inputs)[0]
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[DTYPE]
    assert found.is_contiguous() and found.dtype == inputs[0].dtype


@pytest.mark.parametrize('chunks', [None, 1, 100])
@pytest.mark.parametrize('tokens', TOKENS)
def test_matches_the_definition(tokens: int, chunks: int | None) -> None:
    check(make_inputs((1, tokens, 2, KEY), VALUE, 'network', DTYPE), chunks)


@pytest.mark.parametrize('chunks', [1, 2, 3, 100])
@pytest.mark.parametrize('kind', GATES)
def test_any_gates(kind: str, chunks: int) -> None:
    check(make_inputs((1, 200, 1, KEY), VALUE, kind, DTYPE), chunks)


@pytest.mark.parametrize('chunks', [2, 3, 5])
def test_any_segment_length(chunks: int) -> None:
    check(make_inputs((2, 390, 1, KEY), VALUE, 'network', DTYPE), chunks)


@pytest.mark.parametrize(('tokens', 'chunks'), [(256, 4), (257, 5), (200, 1), (390, 3)])
def test_weak_gates_do_not_need_the_exact_form(
    tokens: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what is not a number, too, and would hide a tile that was never copied."""
    monkeypatch.setattr(bigla_fwd_gluon, 'launch_exact', lambda *args, **settings: None)
    check(make_inputs((1, tokens, 1, KEY), VALUE, 'network', DTYPE), chunks)


@pytest.mark.parametrize('chunks', [1, 2, 100])
def test_strong_gates_after_weak_ones(chunks: int) -> None:
    """The exact form takes the segments that need it, and no other."""
    inputs = make_inputs((1, 130, 1, KEY), VALUE, 'network', DTYPE)
    for gate in inputs[3:5]:
        gate[:, 64:100] = -3.0
    check(inputs, chunks)


@pytest.mark.parametrize('chunks', [1, 2, 100])
def test_views_of_one_projection(chunks: int) -> None:
    """Rows that are not contiguous, and alternate with others."""
    inputs = make_inputs((2, 190, 2, KEY), VALUE, 'network', DTYPE)
    wide = torch.cat([x.flatten(2) for x in inputs], -1)
    views = wide.split([2 * x.shape[-1] for x in inputs], -1)
    check([x.unflatten(-1, (2, -1)) for x in views], chunks)


@pytest.mark.parametrize('chunks', [1, 100])
def test_same_bits_every_time(chunks: int) -> None:
    inputs = make_inputs((1, 75, 2, KEY), VALUE, 'network', DTYPE)
    assert torch.equal(run(inputs, chunks), run(inputs, chunks))


def test_segments() -> None:
    segments = bigla_fwd_gluon.segments
    assert segments(1, 1, 132) == 1
    assert segments(4, 3072, 132) == 1  # held
    assert segments(2, 1, 132) == segments(5, 3072, 132) == 2
    # As many programs as a GPU of 132 multiprocessors runs at once, three on each.
    assert segments(66, 24, 132) == 16 and segments(1024, 12, 132) == 33
    assert segments(66, 6, 132) == 22 and segments(16, 48, 132) == 8  # of three, and of two chunks
    # Rounds of 396 programs: 1,500 fill four better than 600 two.
    assert segments(66, 300, 132) == 5
