"""Kernels of the operators around BiGLA against their definitions in float64.

On a GPU, or on the CPU under Triton's interpreter (`TRITON_INTERPRET=1`, which must be set before
Triton is imported: `test_block.py` runs this file so).
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels import reference
from tests.kernels.interpreter import DEVICE, GPU, skip_without_kernels

skip_without_kernels()

from mmvig.kernels import (  # noqa: E402
    batch_norm_kernels,
    channels_last_kernels,
    depthwise_conv_kernels,
    finest_map_kernels,
    gated_head_norm_kernels,
    log_gates_kernels,
    patch_conv_kernels,
    residual_norm_kernels,
    resized_sum_kernels,
    sampling_points_kernels,
    stem_conv_kernels,
    swiglu_kernels,
    swiglu_product_kernels,
)
from mmvig.kernels.shares import sum_rows, sum_shares  # noqa: E402

FP32 = torch.float32
# Largest ||x - y|| / ||y||: the rounding of results, and of what a product takes.
TOLERANCE = {FP32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE) if GPU else list(TOLERANCE)[:2]
dtypes = pytest.mark.parametrize('dtype', DTYPES, ids=str)
halves = pytest.mark.parametrize('dtype', DTYPES[1:], ids=str)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New memory is full of NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels that take several tiles a program, so that small inputs have several, too."""
    for module in (finest_map_kernels, stem_conv_kernels):
        monkeypatch.setattr(module, 'num_programs', lambda tiles, *_: min(tiles, 2))


def rand(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name]
        assert x.shape == y.shape, name
        error = ((x.double() - y).norm() / y.norm()).item()
        assert error < TOLERANCE[dtype], f'{name}: {error:.2e}'


@halves
@pytest.mark.parametrize(('rows', 'dims', 'features'), [(1, 16, 3), (150, 300, 140), (700, 64, 64)])
def test_swiglu_product(rows: int, dims: int, features: int, dtype: torch.dtype) -> None:
    x = rand(rows, dims + 3, dtype=dtype)[:, 3:]
    weight = (dims**-0.5 * rand(2 * features, dims)).to(dtype)
    out = swiglu_product_kernels.forward(x, weight)
    expected = reference.swiglu_product(x.double(), weight.double())
    assert_close({'out': out}, {'out': expected}, dtype)


@dtypes
@pytest.mark.parametrize(('rows', 'features'), [(1, 1), (33, 40), (5, 600)])
def test_swiglu(rows: int, features: int, dtype: torch.dtype) -> None:
    x, dout = rand(rows, 2 * features, dtype=dtype), rand(rows, features, dtype=dtype)
    again = torch.empty_like(dout)
    dx = swiglu_kernels.backward(x, dout, again)
    actual = {'out': swiglu_kernels.forward(x), 'again': again, 'dx': dx}
    (leaf,) = double(x)
    out = reference.swiglu(leaf)
    (dx,) = torch.autograd.grad(out, leaf, dout.double())
    assert_close(actual, {'out': out, 'again': out, 'dx': dx}, dtype)


@dtypes
@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('branch', ['none', 'plain', 'dropped'])
@pytest.mark.parametrize(
    ('samples', 'tokens', 'dims', 'long'),
    [(2, 37, 48, 10), (3, 1, 5, 10), (1, 200, 130, 10), (2, 200, 130, 0)],
)
def test_residual_norm(
    samples: int, tokens: int, dims: int, long: int, branch: str, center: bool,
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(residual_norm_kernels, 'LONG_TILES', long)
    shape = (samples, tokens, dims)
    x, weight, bias = rand(*shape), rand(dims), rand(dims) if center else None
    y = None if branch == 'none' else rand(*shape, dtype=dtype)
    keep = None
    if branch == 'dropped':
        keep = 1.5 * (1 - torch.arange(samples, device=DEVICE) % 2)
    total, out = residual_norm_kernels.forward(x, y, keep, weight, bias, 1e-3, dtype)
    dtotal, dout = rand(*shape), rand(*shape, dtype=dtype)
    y_dtype = None if y is None else dtype
    again = None if center else torch.empty_like(out)
    dx, dy, share = residual_norm_kernels.backward(
        total, keep, weight, dtotal, dout, 1e-3, y_dtype, center, again
    )
    dparams = share.sum(0)
    actual = dict(total=total, out=out, dx=dx, dweight=dparams[0])
    actual['again'] = out if center else again
    leaves = dict(x=x, y=y, weight=weight, bias=bias)
    leaves = {k: double(v)[0] for k, v in leaves.items() if v is not None}
    wide_keep = None if keep is None else keep.double()
    total, out = reference.residual_norm(
        leaves['x'], leaves.get('y'), leaves['weight'], leaves.get('bias'), 1e-3, wide_keep
    )
    loss = (total * dtotal).sum() + (out * dout).sum()
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    expected = dict(total=total, out=out, again=out) | {f'd{name}': g for name, g in grads.items()}
    if y is not None:
        actual['dy'] = dy
    if center:
        actual['dbias'] = dparams[1]
    assert_close(actual, expected, dtype)


@dtypes
@pytest.mark.parametrize('silu', [False, True])
@pytest.mark.parametrize('with_bias', [False, True])
@pytest.mark.parametrize(('rows', 'heads', 'dims'), [(37, 3, 16), (100, 2, 24), (1, 1, 64)])
def test_gated_head_norm(
    rows: int, heads: int, dims: int, with_bias: bool, silu: bool, dtype: torch.dtype
) -> None:
    width = heads * dims
    x, local = rand(rows, width, dtype=dtype), rand(rows, 2 * width, dtype=dtype)[:, width:]
    gate, dout = rand(rows, width + 3, dtype=dtype)[:, :width], rand(rows, width, dtype=dtype)
    weights, bias = (rand(dims), rand(dims)), rand(width) if with_bias else None
    out = gated_head_norm_kernels.forward(x, local, gate, bias, *weights, silu, 1e-3)
    again = torch.empty_like(out)
    dx, dlocal, dgate, dw, dbias = gated_head_norm_kernels.backward(
        x, local, gate, bias, *weights, dout, silu, 1e-3, again
    )
    actual = dict(out=out, again=again, dx=dx, dlocal=dlocal, dgate=dgate)
    actual |= dict(dw=dw.sum(0), dbias=dbias.sum(0))
    bias = torch.zeros(width, device=DEVICE) if bias is None else bias
    leaves = double(x, local, gate, *weights, bias)
    out = reference.gated_head_norm(*leaves, silu, 1e-3)
    *grads, dw_x, dw_local, dbias = torch.autograd.grad(out, leaves, dout.double())
    names = ('out', 'again', 'dx', 'dlocal', 'dgate', 'dw', 'dbias')
    values = (out, out, *grads, torch.stack([dw_x, dw_local]), dbias)
    assert_close(actual, dict(zip(names, values, strict=True)), dtype)


MAPS = [
    (2, 24, [(5, 19)]),
    (1, 70, [(1, 1)]),
    (2, 24, [(9, 6), (5, 8), (3, 4)]),
    (1, 70, [(20, 3), (1, 9)]),
]


@pytest.mark.parametrize('dtype', DTYPES if GPU else [FP32], ids=str)  # slow in the interpreter
@pytest.mark.parametrize('act', ['none', 'silu', 'gelu'])
@pytest.mark.parametrize(('samples', 'dims', 'shapes'), MAPS)
def test_depthwise_conv(
    samples: int, dims: int, shapes: list, act: str, dtype: torch.dtype
) -> None:
    x, dout = (rand(samples, sum(h * w for h, w in shapes), dims, dtype=dtype) for _ in range(2))
    weight, bias = rand(dims, 1, 3, 3), rand(dims) if dims == 24 else None
    out = depthwise_conv_kernels.convolve(x, weight, bias, shapes, act)
    dx, share = depthwise_conv_kernels.backward(x, weight, bias, dout, shapes, act, True)
    dparams = share.sum(0)
    actual = dict(out=out, dx=dx, dweight=dparams[:, :9].reshape(weight.shape))
    leaves = dict(x=x, weight=weight, bias=bias)
    leaves = {k: double(v)[0] for k, v in leaves.items() if v is not None}
    out = reference.depthwise_conv(leaves['x'], leaves['weight'], shapes, leaves.get('bias'), act)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.double())
    expected = dict(out=out) | {f'd{k}': g for k, g in zip(leaves, grads, strict=True)}
    if bias is not None:
        actual['dbias'] = dparams[:, 9]
    assert_close(actual, expected, dtype)


@dtypes
@pytest.mark.parametrize('gates', [FP32, torch.float16], ids=str)
@pytest.mark.parametrize(('rows', 'dims'), [(70, 96), (1, 16), (200, 300)])
def test_log_gates(rows: int, dims: int, gates: torch.dtype, dtype: torch.dtype) -> None:
    low = rand(rows, 48, dtype=dtype)[:, 16:32]
    weight, bias = rand(dims, 16) / 4, rand(dims)
    fwd, bwd = log_gates_kernels.forward(low, weight, bias, gates)
    assert fwd.dtype == bwd.dtype == gates
    grads = [rand(rows, dims // 2, dtype=gates) for _ in range(2)]
    dlow, share = log_gates_kernels.backward(low, weight, bias, *grads)
    sums = share.sum(0)
    actual = dict(out=torch.cat([fwd, bwd], 1), dlow=dlow, dweight=sums[:-1].t(), db=sums[-1])
    leaves = double(low, weight, bias)
    out = torch.cat(reference.log_gates(*leaves), 1)
    expected = torch.autograd.grad(out, leaves, torch.cat(grads, 1).double())
    names = ('out', 'dlow', 'dweight', 'db')
    worst = gates if dtype == FP32 else dtype
    assert_close(actual, dict(zip(names, (out, *expected), strict=True)), worst)


SHARES = [(1, 5), (3, 2, 1500), (300, 33), (7, 1), (2, 32), (129, 64)]


@pytest.mark.parametrize('shapes', [*([shape] for shape in SHARES), SHARES, SHARES[::-1][:3]])
def test_sum_shares(shapes: list[tuple[int, ...]]) -> None:
    shares = [rand(*shape) for shape in shapes]
    actual = {str(x.shape): out for x, out in zip(shares, sum_shares(*shares), strict=True)}
    assert_close(actual, {str(x.shape): x.double().sum(0) for x in shares}, FP32)


@dtypes
@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('ratio', [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2)])
def test_resized_sum(ratio: tuple[int, int], whole: bool, dtype: torch.dtype) -> None:
    up, down = ratio
    dims, hw = (70, (2, 4)) if up < 8 else (3, (2, 2))
    h, w = (n * up // down for n in hw)
    x, y, dout = (rand(2, h, w + 1, dims, dtype=dtype)[:, :, :w].contiguous() for _ in range(3))
    x = torch.cat([x.flatten(1), x.flatten(1)], 1)[:, : h * w * dims].view(2, h, w, dims)
    tokens, bias, norm = rand(2, *hw, dims), rand(dims), [rand(dims) for _ in range(4)]
    norm[1] = norm[1].exp()
    y, bias = (y, bias) if whole else (None, None)
    args = (x, tokens, y, bias)
    out = resized_sum_kernels.forward(*args, [None] * 4, 1e-3, ratio)
    normed = resized_sum_kernels.forward(*args, norm, 1e-3, ratio)
    dtokens, dbias = resized_sum_kernels.backward(dout, hw, FP32, ratio, whole)
    actual = dict(out=out, normed=normed, dtokens=dtokens)
    leaves = double(*(t for t in args if t is not None))
    maps = [t.permute(0, 3, 1, 2) if t.ndim == 4 else t for t in leaves]
    out = reference.resized_sum(*maps)
    norm = [t.double() for t in norm]
    normed = reference.resized_sum(*maps, *([] if whole else [None, None]), norm, 1e-3)
    grads = torch.autograd.grad(out, leaves, dout.double().permute(0, 3, 1, 2))
    out, normed = (t.permute(0, 2, 3, 1) for t in (out, normed))
    expected = dict(out=out, normed=normed, dtokens=grads[1])
    if whole:
        actual['dbias'], expected['dbias'] = dbias, grads[3]
    assert_close(actual, expected, dtype)


@dtypes
@pytest.mark.parametrize('pool', [False, True])
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize(('dims', 'hw'), [(70, (9, 12)), (4, (1, 2)), (64, (14, 7))])
def test_batch_norm(
    dims: int, hw: tuple[int, int], relu: bool, pool: bool, dtype: torch.dtype
) -> None:
    x = (rand(2, *hw, dims) + 3 * rand(dims)).to(dtype)
    mean, var, weight, bias = rand(dims), rand(dims).exp(), rand(dims), rand(dims)
    running = [mean.clone(), var.clone()]
    stats = batch_norm_kernels.statistics(x, *running, 0.3)
    params = [*stats, weight, bias]
    out, tap = batch_norm_kernels.forward(x, params, 1e-3, relu, pool, with_tap=True)
    dout = rand(*out.shape, dtype=dtype)
    dx, (dweight, dbias) = batch_norm_kernels.backward(x, params, tap, dout, 1e-3, relu)
    given, _ = batch_norm_kernels.forward(x, [mean, var, weight, bias], 1e-3, relu, pool)
    actual = dict(out=out, given=given, dx=dx, dw=dweight, db=dbias)
    actual |= dict(mean=running[0], var=running[1])
    leaves = double(x.permute(0, 3, 1, 2), weight, bias)
    moved = [mean.double(), var.double()]
    settings = dict(eps=1e-3, relu=relu, pool=pool)
    given = reference.batch_norm(leaves[0], moved, *leaves[1:], False, **settings)
    out = reference.batch_norm(leaves[0], moved, *leaves[1:], True, 0.3, **settings)
    dx, dweight, dbias = torch.autograd.grad(out, leaves, dout.double().permute(0, 3, 1, 2))
    out, given, dx = (t.permute(0, 2, 3, 1) for t in (out, given, dx))
    expected = dict(out=out, given=given, dx=dx, dw=dweight, db=dbias)
    assert_close(actual, expected | dict(mean=moved[0], var=moved[1]), dtype)


@dtypes
@pytest.mark.parametrize('heads', [(6, 3, 4), (2, 1, 4), (3, 2, 3)])
def test_sampling_points(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, levels, points = heads
    wide = h * levels * points
    offsets, logits = rand(2, 53, 3 * wide + 2, dtype=dtype)[..., 1:-1].split([2 * wide, wide], -1)
    table = (rand(53, 2), rand(levels, 2))
    locations, weights = sampling_points_kernels.forward(offsets, logits, *table, heads)
    grads = [rand(*locations.shape), rand(*weights.shape)]
    doffsets, dlogits = sampling_points_kernels.backward(weights, table[1], *grads, dtype)
    actual = dict(locations=locations, weights=weights, doffsets=doffsets, dlogits=dlogits)
    leaves, wide_table = double(offsets, logits), [t.double() for t in table]
    outs = reference.sampling_points(*leaves, wide_table, heads)
    expected = (*outs, *torch.autograd.grad(outs, leaves, [g.double() for g in grads]))
    assert_close(actual, dict(zip(actual, expected, strict=True)), dtype)


@dtypes
@pytest.mark.parametrize('shape', [(1, 5), (700, 70), (1000, 130)])
def test_sum_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = rand(shape[0], shape[1] + 3, dtype=dtype)[:, 2:-1]
    assert_close({'sum': sum_rows(x)}, {'sum': x.double().sum(0)}, FP32)


@dtypes
@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize(
    ('cin', 'dims', 'hw'), [(3, 64, (9, 14)), (1, 70, (2, 3)), (3, 8, (1, 1)), (3, 24, (21, 30))]
)
@pytest.mark.usefixtures('_few_programs')
def test_stem_conv(
    cin: int, dims: int, hw: tuple[int, int], whole: bool, dtype: torch.dtype
) -> None:
    x, weight = rand(2, *hw, cin, dtype=dtype), rand(dims, cin, 3, 3)
    norm = [rand(dims), rand(dims).exp(), rand(dims), rand(dims)] if whole else None
    out = stem_conv_kernels.forward(x, weight, norm or [None] * 4, 1e-3, whole)
    wide = None if norm is None else [t.double() for t in norm]
    args = (x.double().permute(0, 3, 1, 2), weight.to(dtype).double(), wide, 1e-3, whole)
    assert_close({'out': out}, {'out': reference.stem_conv(*args).permute(0, 2, 3, 1)}, dtype)


@dtypes
@pytest.mark.parametrize('shape', [(2, 3, 37, 26), (1, 2, 1, 1), (3, 4, 32, 24)])
def test_channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Copies: the same bits as PyTorch's, of planes and into images with gaps between them."""
    b, cin, h, w = shape
    x = rand(b, cin + 1, h, w)[:, :cin]
    out = torch.zeros(b, 2, h, w, cin, dtype=dtype, device=DEVICE)
    channels_last_kernels.launch(x, out[:, 0].permute(0, 3, 1, 2))
    assert torch.equal(out[:, 0], x.permute(0, 2, 3, 1).to(dtype))
    assert not out[:, 1].any()


@dtypes
@pytest.mark.parametrize(
    ('cin', 'window', 'stride', 'padding'),
    [(3, (9, 9), 8, 1), (1, (4, 3), 2, 0), (4, (2, 2), 3, 2)],
)
def test_windows_of_patch_conv(
    cin: int, window: tuple[int, int], stride: int, padding: int, dtype: torch.dtype
) -> None:
    """Copies: the same bits as PyTorch's `unfold`, and zeros behind."""
    x = rand(2, 37, 26, cin, dtype=dtype)
    numbers = cin * window[0] * window[1]
    width = numbers + 5
    rows = patch_conv_kernels.gather(x, window, stride, padding, width)
    expected = F.unfold(x.permute(0, 3, 1, 2), window, padding=padding, stride=stride)
    assert torch.equal(rows[..., :numbers].flatten(1, 2), expected.transpose(1, 2))
    assert not rows[..., numbers:].any()


@dtypes
@pytest.mark.usefixtures('_few_programs')
@pytest.mark.parametrize(('dims', 'stem', 'ratio'), [(70, 24, 4), (8, 64, 2), (64, 5, 1)])
def test_finest_map(dims: int, stem: int, ratio: int, dtype: torch.dtype) -> None:
    hw = (2, 4)
    h, w = (n * ratio for n in hw)
    x, y = rand(2, h // 2, w // 2, 4 * dims, dtype=dtype), rand(2, h, w, stem, dtype=dtype)
    project, tokens, bias = rand(dims, stem, dtype=dtype), rand(2, *hw, dims), rand(dims)
    norm = [rand(dims), rand(dims).exp(), rand(dims), rand(dims)]
    out = finest_map_kernels.forward(x, y, project, tokens, bias, norm, 1e-3, ratio)
    wide = [t.double() for t in (x, y, project, tokens, bias)]
    wide[1], wide[3] = (t.permute(0, 3, 1, 2) for t in (wide[1], wide[3]))
    expected = reference.finest_map(*wide, [t.double() for t in norm], 1e-3)
    assert_close({'out': out}, {'out': expected.permute(0, 2, 3, 1)}, dtype)
