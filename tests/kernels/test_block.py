"""The operators around BiGLA: definitions, arguments, dispatch, life among PyTorch's features.

Their kernels are compared with float64 in `test_block_kernels.py`.
"""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvig import kernels
from mmvig.doctor import block
from mmvig.kernels import (
    channels_last,
    depthwise_conv,
    gated_head_norm,
    log_gates,
    reference,
    residual_norm,
    swiglu,
    swiglu_product,
)

from .interpreter import run_interpreted

# but for what only the number of tokens changes, on a GPU
WHATS = sorted(what for what in block.DRAW if 'many tokens' not in what)
whats = pytest.mark.parametrize('what', WHATS)
# Others' plain form, which torch.compile sees, too, is PyTorch's operators one by one.
PLAIN = (
    'batch_norm', 'channels_last', 'finest_map', 'patch_conv', 'sampling_points', 'stem_conv',
)  # fmt: skip
registered = pytest.mark.parametrize(
    'what', [what for what in WHATS if block.DRAW[what][0] not in PLAIN]
)


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs Triton')
def test_kernels_under_the_interpreter() -> None:
    """Runs `test_block_kernels.py` in a process where Triton is not yet imported."""
    run_interpreted(Path(__file__).with_name('test_block_kernels.py'))


def tensors_and_rest(args: list) -> tuple[list[Tensor], list]:
    """The leaves in float64, and where they go."""
    leaves = [x.detach().double().requires_grad_() for x in args if isinstance(x, Tensor)]
    return leaves, [None if isinstance(x, Tensor) else x for x in args]


def as_double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) else x


@whats
def test_definition_has_right_gradients(what: str) -> None:
    """`gradcheck` of few numbers of the plain form, which float64 takes."""
    torch.manual_seed(0)
    op, args = block.draw(block.Case(what, torch.float32, 4), 'cpu')
    args = [x[:, :6] if isinstance(x, Tensor) and x.ndim == 3 else x for x in args]
    args = [[(2, 2), (1, 2)] if isinstance(x, list) else x for x in args]
    args = [torch.float64 if isinstance(x, torch.dtype) else x for x in args]
    args = [x if isinstance(x, Tensor) and x.requires_grad else as_double(x) for x in args]
    if op == 'sampling_points':
        centers, pixel = args[-2]
        args[-2] = (centers[:6], pixel)
    args = [tuple(as_double(t) for t in x) if isinstance(x, tuple) else x for x in args]
    if op == 'depthwise_conv':
        args[0] = args[0][:, :6]
    if op == 'finest_map':
        x, y, project, tokens, *rest = args
        args = [x[:1, :2, :2], y[:1, :3, :4, :4], project[:, :3], tokens[:1, :, :1, :1], *rest]
    places = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]

    def function(*leaves: Tensor) -> Tensor:
        full = list(args)
        for i, x in zip(places, leaves, strict=True):
            full[i] = x
        return getattr(kernels, op)(*full)

    leaves = [args[i].detach().double().requires_grad_() for i in places]
    assert torch.autograd.gradcheck(function, leaves)


@registered
def test_half_precision_rounds_once_on_the_cpu(what: str) -> None:
    case = block.Case(what, torch.bfloat16, 32)
    op, args = block.draw(case, 'cpu')
    errors = block.compare(getattr(kernels, op), getattr(reference, op), args)
    assert max(errors) < 2e-2


def test_swiglu_is_that_of_pytorch() -> None:
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :12]) * x[..., 12:])


def test_residual_norm_is_that_of_pytorch() -> None:
    x, y, weight, bias = (torch.randn(s) for s in ((2, 5, 8), (2, 5, 8), (8,), (8,)))
    keep = torch.tensor([0.0, 2.0])
    total, normed = residual_norm(x, y, weight, eps=0.1, keep=keep)
    torch.testing.assert_close(total, x + y * keep[:, None, None])
    torch.testing.assert_close(normed, F.rms_norm(total, (8,), weight, 0.1))
    total, normed = residual_norm(x, None, weight, bias, eps=0.1)
    assert total is x
    torch.testing.assert_close(normed, F.layer_norm(x, (8,), weight, bias, 0.1))


def test_gated_head_norm_between_its_ends() -> None:
    x, local, ends = torch.randn(2, 7, 12), torch.randn(2, 7, 12), torch.full((2, 7, 12), 100.0)
    a, b = torch.randn(4), torch.randn(4)
    heads = partial(torch.unflatten, dim=-1, sizes=(3, 4))
    for gate, t, w in ((ends, x, a), (-ends, local, b)):
        expected = F.rms_norm(heads(t), (4,), w, 1e-6).flatten(-2)
        torch.testing.assert_close(gated_head_norm(x, local, gate, a, b), expected)
    bias = torch.full((12,), 200.0)
    torch.testing.assert_close(
        gated_head_norm(x, local, -ends, a, b, bias), gated_head_norm(x, local, ends, a, b)
    )


@pytest.mark.parametrize(('act', 'function'), [('none', None), ('silu', F.silu), ('gelu', F.gelu)])
def test_depthwise_conv_is_that_of_pytorch(act: str, function) -> None:
    maps = [torch.randn(2, 6, 3, 5), torch.randn(2, 6, 2, 1)]
    weight, bias = torch.randn(6, 1, 3, 3), torch.randn(6)
    tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
    expected = [F.conv2d(m, weight, bias, padding=1, groups=6) for m in maps]
    expected = torch.cat([m.flatten(2).transpose(1, 2) for m in expected], 1)
    actual = depthwise_conv(tokens, weight, [(3, 5), (2, 1)], bias, act)
    torch.testing.assert_close(actual, function(expected) if function else expected)


def test_log_gates_by_hand() -> None:
    low, weight, bias = torch.randn(2, 5, 16), torch.randn(6, 16), torch.randn(6)
    fwd, bwd = log_gates(low, weight, bias)
    expected = torch.log(1 / (1 + torch.exp(-(low @ weight.T + bias)))) / 16
    torch.testing.assert_close(torch.cat([fwd, bwd], -1), expected, rtol=1e-4, atol=1e-5)


X, W8, W4 = torch.ones(2, 6, 8), torch.ones(8), torch.ones(4)
CONV = torch.ones(8, 1, 3, 3)
FP32 = torch.float32


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: swiglu(X[..., :7]), r'x must be \(\.\.\., 2 F\)'),
        (lambda: swiglu(X.int()), 'of a floating dtype'),
        (lambda: swiglu_product(X, torch.ones(7, 8)), r'must be \(\.\.\., C\) and \(2 F, C\)'),
        (lambda: swiglu_product(X, torch.ones(6, 8).half()), 'must share a dtype'),
        (lambda: residual_norm(X, X[:1], W8), 'y .* must have the shape of x'),
        (lambda: residual_norm(X, X, W4), r'weight must be \(8,\)'),
        (lambda: residual_norm(X, X, W8, W4), r'bias must be \(8,\)'),
        (lambda: residual_norm(X, None, W8, keep=torch.ones(2)), 'one for each sample of y'),
        (lambda: residual_norm(X, X, W8, keep=torch.ones(3)), r'keep must be \(2,\)'),
        (lambda: residual_norm(X, X.int(), W8), 'y must be of a floating dtype'),
        (lambda: gated_head_norm(X, X, X[:1], W4, W4), 'gate .* must have the shape of x'),
        (lambda: gated_head_norm(X, X, X, W4[:3], W4[:3]), 'a divisor of the channels'),
        (lambda: gated_head_norm(X, X, X, W4, W4, W4), r'gate_bias must be \(8,\)'),
        (lambda: gated_head_norm(X, X.half(), X, W4, W4), 'must share a dtype'),
        (lambda: depthwise_conv(X[0], CONV, [(2, 3)]), r'x must be \(B, S, C\)'),
        (lambda: depthwise_conv(X, CONV[:4], [(2, 3)]), r'weight must be \(8, 1, 3, 3\)'),
        (lambda: depthwise_conv(X, CONV, [(2, 4)]), 'do not have the 6 tokens'),
        (lambda: depthwise_conv(X, CONV, [(2, 3)], W4), r'bias must be \(8,\)'),
        (lambda: depthwise_conv(X, CONV, [(2, 3)], act='relu'), 'act must be one of none, silu'),
        (lambda: channels_last(X, FP32), r'must be \(B, CIN, H, W\)'),
        (lambda: channels_last(CONV, torch.int8), 'torch.int8 floating'),
        (lambda: channels_last(CONV, FP32, CONV.half()), r'of torch.float32, got \(8, 1, 3, 3\)'),
        (lambda: channels_last(CONV, FP32, CONV[:1]), r'out must be \(8, 1, 3, 3\)'),
        (lambda: log_gates(X, torch.ones(6, 16), torch.ones(6)), r'weight must be \(C, R\)'),
        (lambda: log_gates(X, torch.ones(6, 8), W8), r'bias must be \(6,\)'),
    ],
)
def test_says_what_does_not_fit(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_autocast_decides_the_dtype() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        total, normed = residual_norm(X, X.bfloat16(), W8)
        assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
        assert residual_norm(X, None, W8, dtype=torch.float32)[1].dtype == torch.float32
        assert gated_head_norm(X, X, X, W4, W4).dtype == torch.bfloat16
        assert depthwise_conv(X, CONV, [(2, 3)]).dtype == torch.bfloat16
        assert log_gates(X, torch.ones(6, 8), torch.ones(6))[0].dtype == torch.bfloat16
    with torch.autocast('cpu', torch.float16):
        assert log_gates(X, torch.ones(6, 8), torch.ones(6))[0].dtype == torch.float32


def test_no_tokens() -> None:
    x = X[:0].requires_grad_()
    outs = [swiglu(x), *residual_norm(x, x, W8), gated_head_norm(x, x, x, W4, W4)]
    outs += [depthwise_conv(x, CONV, [(2, 3)]), *log_gates(x, torch.ones(6, 8), torch.ones(6))]
    assert [o.shape[0] for o in outs] == [0] * 7
    sum(o.sum() for o in outs).backward()


# From here on: on a GPU.

gpu = pytest.mark.gpu
dtypes = pytest.mark.parametrize('dtype', list(block.TOLERANCE), ids=str)


@gpu
@dtypes
@whats
def test_eager_form(what: str, dtype: torch.dtype) -> None:
    for dims in (24, 64):
        errors, allowed = block.check(block.Case(what, dtype, dims))
        assert max(errors) < allowed, dims


@gpu
@registered
def test_registered_form(what: str) -> None:
    """As `torch.compile` sees it: the same numbers, in one graph for all sizes."""
    op, args = block.draw(block.Case(what, torch.bfloat16, 64), 'cuda')
    torch._dynamo.reset()
    function = getattr(kernels, op)
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for samples in (2, 3, 5):
        some = [torch.cat([x] * 3)[:samples] if is_tokens(x) else x for x in args]
        if 'RMS' in what:
            some[5] = torch.cat([args[5]] * 3)[:samples]
        some = [
            y.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else y
            for x, y in zip(args, some, strict=True)
        ]
        actual = block.results_and_gradients(compiled, some)
        expected = block.results_and_gradients(function, some)
        if what == 'residual_norm, layer':
            # without a branch, only the eager form adds the stream's gradient before it rounds
            torch.testing.assert_close(actual[1].pop(0), expected[1].pop(0), rtol=2e-2, atol=2e-2)
        for xs, ys in zip(actual, expected, strict=True):
            for x, y in zip(xs, ys, strict=True):
                torch.testing.assert_close(x, y)
        graphs.append(counter.frame_count)
    # of its own for a call without gradients, and of the same number whatever the size
    assert graphs == graphs[:1] * 3 and graphs[0] <= 4


def is_tokens(x: object) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3


@gpu
@whats
def test_same_bits_every_time(what: str) -> None:
    op, args = block.draw(block.Case(what, torch.bfloat16, 64), 'cuda')
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # of the stem's weights
        first, second = (block.results_and_gradients(getattr(kernels, op), args) for _ in range(2))
    for x, y in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(x, y)


@gpu
@whats
def test_strides_do_not_matter(what: str) -> None:
    op, args = block.draw(block.Case(what, torch.float32, 64), 'cuda')
    strided = [
        x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        if is_tokens(x)
        else x
        for x in args
    ]
    function = getattr(kernels, op)
    for xs, ys in zip(
        block.results_and_gradients(function, args),
        block.results_and_gradients(function, strided),
        strict=True,
    ):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y)


@gpu
@whats
def test_checkpointing_and_second_derivatives(what: str) -> None:
    op, args = block.draw(block.Case(what, torch.float32, 64), 'cuda')
    function = getattr(kernels, op)
    again = partial(checkpoint, function, use_reentrant=False)
    for x, y in zip(
        block.results_and_gradients(function, args)[1],
        block.results_and_gradients(again, args)[1],
        strict=True,
    ):
        torch.testing.assert_close(x, y)
    # PyTorch's operators, where gradients are wanted, or in float32
    theirs = ('channels_last', 'finest_map', 'patch_conv', 'stem_conv')
    if 'given' in what or what.split(',')[0] in theirs:
        return
    out = function(*args)
    out = out[-1] if isinstance(out, tuple) else out
    leaf = next(x for x in args if isinstance(x, Tensor) and x.requires_grad)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match='once'):
        grad.sum().backward()


@gpu
@whats
def test_cuda_graph(what: str) -> None:
    op, args = block.draw(block.Case(what, torch.bfloat16, 64), 'cuda')
    function = getattr(kernels, op)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        expected = function(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        actual = function(*args)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(actual, expected)


@gpu
def test_other_dtypes_take_the_plain_form() -> None:
    x = torch.randn(2, 6, 8, device='cuda', dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, [x])


class Parent(nn.Module):
    """Registered operators keep their fakes: exported programs have them whole."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


@gpu
def test_export() -> None:
    x = torch.randn(2, 6, 8, device='cuda')
    program = torch.export.export(Parent(), (x,))
    assert 'mmvig.swiglu' in str(program.graph)
    torch.testing.assert_close(program.module()(x), swiglu(x))
