"""The Triton kernels of `bidirectional_gla` against its definition in float64.

On a GPU, or on the CPU under Triton's interpreter (`TRITON_INTERPRET=1`, which must be set before
Triton is imported: `test_bigla.py` runs this file so).
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels import bigla_chunked, reference
from tests.kernels.interpreter import DEVICE, GPU, skip_without_kernels

skip_without_kernels()

import triton.language as tl  # noqa: E402

from mmvig.kernels.bigla_bwd import backward  # noqa: E402
from mmvig.kernels.bigla_fwd import forward  # noqa: E402
from mmvig.kernels.bigla_plan import choose_chunks, make_plan  # noqa: E402

NAMES = ('o', 'dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd')
# Largest ||x - y|| / ||y||: roundings of operands and results; of float32, of three TF32 products.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
TOKENS = [1, 63, 196, 1000] if GPU else [1, 15, 40]
HEADS = 2 if GPU else 1  # where another test has several
CHUNK = None if GPU else 16  # the interpreter is slow: several chunks of few tokens
GATES = ('network', 'zero', 'strong', 'alternating', 'alone')
dtypes = pytest.mark.parametrize('dtype', DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New memory is full of NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_gates(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Log gates (B, N, H, K)."""
    if kind == 'network':
        return F.logsigmoid(torch.randn(shape)) / 16
    if kind == 'zero':
        return torch.zeros(shape)
    if kind == 'strong':  # few are large, any
        return -(torch.rand(shape) ** 8) * 50
    if kind == 'alternating':
        return (-50.0 * (torch.arange(shape[1]) % 2))[:, None, None].expand(shape)
    return torch.full(shape, -50.0)


def make_inputs(shape: tuple[int, ...], value: int, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, both gates and the gradient of the output; shape is (B, N, H, K)."""
    q, k = torch.randn(2, *shape)
    v, do = torch.randn(2, *shape[:3], value)
    xs = [q, k, v, make_gates(kind, shape), make_gates(kind, shape), do]
    return [x.to(DEVICE, dtype).contiguous() for x in xs]


def run(inputs: list[Tensor], chunks: int = 2, chunk: int | None = CHUNK) -> list[Tensor]:
    """Output and gradients from the kernels, with segments of so many chunks."""
    *args, do = inputs
    scale = args[0].shape[-1] ** -0.5
    return [
        forward(*args, scale, chunk, chunks),
        *backward(*args, do, scale, chunk, chunks),
    ]


def check_into(inputs: list[Tensor], backward: Callable[..., tuple]) -> None:
    """Gradients of q, k and v in parts of one tensor are those without; the rest is not touched.

    Those of strong gates, too, which another kernel writes.
    """
    b, n, h, key = inputs[0].shape
    for gate in inputs[3:5]:
        gate[:, 20:36, :, ::3] = -40.0
    scale = key**-0.5
    width = h * (2 * key + inputs[2].shape[-1])
    wide = torch.full((b, n, width + 16), 7.0, dtype=inputs[0].dtype, device=inputs[0].device)
    parts = wide[..., :width].split([h * x.shape[-1] for x in inputs[:3]], -1)
    into = tuple(part.unflatten(-1, (h, -1)) for part in parts)
    expected = backward(*inputs, scale)
    found = backward(*inputs, scale, into=into)
    for x, y, z in zip(found, expected, [*into, *found[3:]], strict=True):
        assert torch.equal(x, y)
        assert torch.equal(z, y)
    assert (wide[..., width:] == 7.0).all()


def expect(inputs: list[Tensor], function=bigla_chunked.bidirectional_gla) -> list[Tensor]:
    """The same in float64, which is what the kernels are measured against."""
    *args, do = (x.detach().cpu().double() for x in inputs)
    args = [x.requires_grad_() for x in args]
    out = function(*args)
    return [out.detach(), *torch.autograd.grad(out, args, do)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Every result has a small relative error.

    What is nearly zero, a small absolute one: gradients of gates are differences of q dq and k dk.
    """
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        floor = 0.25 * y.numel() ** 0.5
        error = ((x.cpu().double() - y).norm() / y.norm().clamp_min(floor)).item()
        assert error < tolerance, f'{name}: {error:.2e}'


@dtypes
@pytest.mark.parametrize('kind', GATES)
@pytest.mark.parametrize('tokens', TOKENS)
def test_matches_the_definition(tokens: int, kind: str, dtype: torch.dtype) -> None:
    inputs = make_inputs((1, tokens, HEADS, 16), 32, kind, dtype)
    assert_close(run(inputs), expect(inputs, reference.bidirectional_gla), TOLERANCE[dtype])


@pytest.mark.parametrize('chunks', [1, 3, 100])
def test_any_segment_length(chunks: int) -> None:
    inputs = make_inputs((HEADS, 90, 1, 16), 32, 'network', torch.float32)
    assert_close(run(inputs, chunks), expect(inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize(('key', 'value'), [(32, 64), (24, 40), (16, 96), (64, 16)])
def test_any_head_dims(key: int, value: int) -> None:
    inputs = make_inputs((1, 40, 1, key), value, 'network', torch.float32)
    assert_close(run(inputs), expect(inputs), TOLERANCE[torch.float32])


@dtypes
def test_random_shapes_strides_and_gates(dtype: torch.dtype) -> None:
    for seed in range(20 if GPU else 3):
        rng = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, rng: torch.Generator = rng) -> int:
            return int(torch.randint(low, high + 1, (), generator=rng))

        shape = (draw(1, 2), draw(1, 700 if GPU else 40), draw(1, 3), 2 ** draw(4, 5))
        kind = GATES[draw(0, len(GATES) - 1)]
        inputs = make_inputs(shape, 32 * draw(1, 2), kind, dtype)
        # Channels of a wider tensor, in a layout with heads or tokens first.
        for i, x in enumerate(inputs):
            wide = torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]
            order = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)][draw(0, 2)]
            inverse = sorted(range(4), key=order.__getitem__)
            inputs[i] = wide.permute(order).contiguous().permute(inverse)
            if draw(0, 1):
                inputs[i] = wide
        actual = run(inputs, draw(1, 5))
        assert_close(actual, expect(inputs), TOLERANCE[dtype])


def test_views_of_one_projection() -> None:
    qkv = torch.randn(2, 50, 2 * 16 * 2 + 2 * 32, device=DEVICE)
    q, k, v = (x.unflatten(-1, (2, -1)) for x in qkv.split([32, 32, 64], -1))
    inputs = make_inputs((2, 50, 2, 16), 32, 'network', torch.float32)
    inputs[:3] = q, k, v
    assert_close(run(inputs), expect(inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize('value', [64, 96])
def test_gradients_next_to_each_other(value: int) -> None:
    """Of one block of value channels and of several, whose shares are summed."""
    inputs = make_inputs((2, 40, 1, 16), value, 'network', DTYPES[0])
    check_into(inputs, partial(backward, chunk=CHUNK, chunks=2))


def test_gates_of_a_wider_dtype() -> None:
    inputs = make_inputs((1, 70, 2, 16), 32, 'network', DTYPES[-1])
    inputs[3:5] = (make_gates('network', (1, 70, 2, 16)).to(DEVICE) for _ in range(2))
    actual = run(inputs)
    assert actual[4].dtype == torch.float32
    assert_close(actual, expect(inputs), TOLERANCE[DTYPES[-1]])


def test_reversed_sequence_with_swapped_gates() -> None:
    q, k, v, fwd, bwd, do = make_inputs((1, 75, 2, 16), 32, 'network', torch.float32)
    there = run([q, k, v, fwd, bwd, do])
    back = run([x.flip(1) for x in (q, k, v, bwd, fwd, do)])
    back = [x.flip(1).cpu().double() for x in back]
    back[4], back[5] = back[5], back[4]
    assert_close(there, back, TOLERANCE[torch.float32])


def test_gates_of_zero_are_plain_linear_attention() -> None:
    q, k, v, *_ = inputs = make_inputs((1, 40, 1, 16), 32, 'zero', torch.float32)
    q, k, v = (x.cpu().double()[:, :, 0] for x in (q, k, v))
    everything = q @ (k.mT @ v) + (q * k).sum(-1, keepdim=True) * v
    actual = run(inputs)[0].cpu().double()[:, :, 0]
    torch.testing.assert_close(actual, everything / 2 / 4, rtol=1e-4, atol=1e-4)


def test_strong_gates_leave_each_token_alone() -> None:
    q, k, v, *_ = inputs = make_inputs((1, 40, 1, 16), 32, 'alone', torch.float32)
    q, k, v = (x.cpu().double() for x in (q, k, v))
    actual = run(inputs)[0].cpu().double()
    torch.testing.assert_close(actual, (q * k).sum(-1, keepdim=True) * v / 4, rtol=1e-4, atol=1e-4)


@dtypes
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    inputs = make_inputs((1, 75, HEADS, 16), 32, 'network', dtype)
    for x, y in zip(run(inputs), run(inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('n_chunks', [1, 7, 66, 1024])
@pytest.mark.parametrize('heads', [1, 24, 3072])
def test_segments_fill_the_device(n_chunks: int, heads: int) -> None:
    chunks = choose_chunks(n_chunks, heads, 264)
    assert 1 <= chunks <= n_chunks
    assert heads * -(-n_chunks // chunks) >= min(heads * n_chunks, 264 // 2)


def test_tf32_has_no_chunks_of_64_tokens() -> None:
    for dk in (16, 32, 64, 128):
        q, v = torch.empty(1, 300, 1, dk), torch.empty(1, 300, 1, 64)
        assert make_plan(q.half(), v.half()).chunk <= 32
        assert make_plan(q, v).chunk <= 32
    assert make_plan(q.bfloat16()[..., :32], v.bfloat16()).chunk == 64


def test_the_forward_alone_takes_tf32_at_16_key_channels() -> None:
    q, v = torch.empty(1, 300, 1, 32).bfloat16(), torch.empty(1, 300, 1, 64).bfloat16()
    for dk, grads, op in (
        (16, False, tl.float32),
        (16, True, tl.bfloat16),
        (32, False, tl.bfloat16),
    ):
        assert make_plan(q[..., :dk], v, grads=grads).op == op
