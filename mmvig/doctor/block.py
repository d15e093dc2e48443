"""Checks of the operators around BiGLA and in the adapter: every dtype, results, all gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmvig import kernels
from mmvig.kernels import reference
from mmvig.kernels.grid import power_of_2

NAME = "ViG's other operators"
COLUMNS = ('results', 'gradients')
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Largest ||x - y|| / ||y||: the rounding of results, and of what a product takes.
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}

Inputs = list[Any]
Random = Callable[..., Tensor]


def _swiglu(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    return [rand(2, 301, 2 * dims, dtype=dtype)]


def _swiglu_product(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    weight = dims**-0.5 * rand(2 * (dims + dims // 2), dims, dtype=dtype)
    return [rand(2, 301, dims, dtype=dtype), weight]


def _rms_norm(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    keep = torch.tensor([0.0, 1.25])
    stream = rand(2, 77, dims, dtype=FP32)
    return [stream, rand(2, 77, dims, dtype=dtype), rand(dims, dtype=FP32), None, 1e-6, keep, dtype]


def _layer_norm(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    x, weight = rand(3, 77, dims, dtype=dtype), rand(dims, dtype=FP32)
    return [x, None, weight, rand(dims, dtype=FP32)]


def _many_tokens(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    """So many that a program of the gradients loads the next tile while one is in work."""
    tokens = 6_000_000 // power_of_2(dims)
    stream, branch = rand(2, tokens, dims, dtype=FP32), rand(2, tokens, dims, dtype=dtype)
    return [stream, branch, rand(dims, dtype=FP32), None, 1e-6, None, dtype]


def _gated_head_norm(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    wide = rand(2, 301, 3 * 2 * dims, dtype=dtype)  # two heads; rows with gaps between them
    weights = [rand(dims, dtype=FP32) for _ in range(2)]
    return [*wide.chunk(3, -1), *weights, rand(2 * dims, dtype=FP32), True]


def _depthwise_conv(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    shapes = [(20, 33), (9, 17), (1, 2)]
    x = rand(2, sum(h * w for h, w in shapes), dims, dtype=dtype)
    return [x, rand(dims, 1, 3, 3, dtype=FP32), shapes, rand(dims, dtype=FP32), 'gelu']


def _silu_conv(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    x = rand(2, 50 * 84, dims, dtype=dtype)
    return [x, rand(dims, 1, 3, 3, dtype=FP32), [(50, 84)], None, 'silu']


def _log_gates(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    low = rand(2, 333, 16 + 3, dtype=dtype)[..., :16]
    return [low, rand(dims, 16, dtype=FP32), rand(dims, dtype=FP32)]


def _maps(rand: Random, dtype: torch.dtype, dims: int, h: int, w: int) -> Tensor:
    """(2, C, h, w), channels last."""
    return rand(2, h, w, dims, dtype=dtype).permute(0, 3, 1, 2)


def _finest_map(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    x, y = rand(2, 8, 12, 4 * dims, dtype=dtype), _maps(rand, dtype, 40, 16, 24)
    tokens, bias = _maps(rand, FP32, dims, 4, 6), rand(dims, dtype=FP32)
    project = rand(dims, 40, dtype=dtype)
    return [x, y, project, tokens, bias, _batch_norm(rand, dims)]


def _batch_norm(rand: Random, dims: int) -> tuple[Tensor, ...]:
    """Mean, variance, weight and bias, constants."""
    mean, var, weight, bias = (rand(dims, dtype=FP32) for _ in range(4))
    return mean, var.exp(), weight, bias


def _upsampled_sum(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    x, y = (_maps(rand, dtype, dims, 8, 12) for _ in range(2))
    tokens, bias = _maps(rand, FP32, dims, 2, 3), rand(dims, dtype=FP32)
    return [x, tokens, y, bias, _batch_norm(rand, dims), 1e-5]


def _halved_sum(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    return [_maps(rand, dtype, dims, 2, 3), _maps(rand, dtype, dims, 4, 6)]


def _pooled_norm(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    weight, bias = rand(dims, dtype=FP32), rand(dims, dtype=FP32)
    running = _batch_norm(rand, dims)[:2]
    # momentum 0: what was called once before gives the same again
    return [_maps(rand, dtype, dims, 9, 14), running, weight, bias, True, 0.0, 1e-5, True, True]


def _plain_norm(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    return [*_pooled_norm(rand, dtype, dims)[:-2], False, False]


def _given_norm(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    x, running, weight, bias, *_ = _pooled_norm(rand, dtype, dims)
    return [x, running, weight, bias, False, 0.0, 1e-5, True, False]


def _sampling_points(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    heads = (dims // 4, 3, 4)
    wide = 3 * dims
    both = rand(2, 49, 3 * wide, dtype=dtype)
    table = (rand(49, 2, dtype=FP32), rand(3, 2, dtype=FP32))
    return [*both.split([2 * wide, wide], -1), table, heads]


def _stem_conv(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    image = _maps(rand, dtype, 3, 37, 50)
    return [(image,), rand(dims, 3, 3, 3, dtype=FP32), _batch_norm(rand, dims), 1e-5, False]


def _stem_conv_relu(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    image, weight, (mean, var, scale, shift), eps, _ = _stem_conv(rand, dtype, dims)
    # Of each channel ReLU keeps all or nothing: near 0 the rounding before it would decide.
    shift = 1e3 * shift.sign()
    return [image, weight, (mean, var, scale, shift), eps, True]


def _patch_conv(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    image = _maps(rand, dtype, 3, 37, 50)
    return [(image,), rand(dims, 3, 9, 9, dtype=FP32), rand(dims, dtype=FP32), 8, 1]


def _channels_last(rand: Random, dtype: torch.dtype, dims: int) -> Inputs:
    return [rand(2, 3, 37, 50 + dims, dtype=FP32), dtype]


# Operator, and what makes its arguments, by the case's name.
DRAW: dict[str, tuple[str, Callable[[Random, torch.dtype, int], Inputs]]] = {
    'swiglu': ('swiglu', _swiglu),
    'swiglu_product': ('swiglu_product', _swiglu_product),
    'residual_norm, RMS': ('residual_norm', _rms_norm),
    'residual_norm, layer': ('residual_norm', _layer_norm),
    'residual_norm, many tokens': ('residual_norm', _many_tokens),
    'gated_head_norm': ('gated_head_norm', _gated_head_norm),
    'depthwise_conv, 3 maps, GELU': ('depthwise_conv', _depthwise_conv),
    'depthwise_conv, SiLU': ('depthwise_conv', _silu_conv),
    'log_gates': ('log_gates', _log_gates),
    'batch_norm, ReLU, pooling': ('batch_norm', _pooled_norm),
    'batch_norm': ('batch_norm', _plain_norm),
    'batch_norm, given statistics, ReLU': ('batch_norm', _given_norm),
    'channels_last': ('channels_last', _channels_last),
    'stem_conv': ('stem_conv', _stem_conv),
    'stem_conv, ReLU': ('stem_conv', _stem_conv_relu),
    'patch_conv': ('patch_conv', _patch_conv),
    'sampling_points': ('sampling_points', _sampling_points),
    'finest_map': ('finest_map', _finest_map),
    'resized_sum, by 4': ('resized_sum', _upsampled_sum),
    'resized_sum, by 1/2': ('resized_sum', _halved_sum),
}


# Operators whose gradient to the weights is cuDNN's, in half precision.
ROUNDED_TWICE = ('stem_conv',)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    what: str
    dtype: torch.dtype
    dims: int

    def __str__(self) -> str:
        return f'{self.what}, {self.dims}, {str(self.dtype).removeprefix("torch.")}'


def cases(quick: bool) -> Iterator[Case]:
    """Channels, or those of a head, that the networks have, and odd ones unless `quick`."""
    for what in DRAW:
        for dtype in TOLERANCE:
            for dims in (32, 64) if quick else (32, 64, 96, 192, 200):
                yield Case(what, dtype, dims)


def check(case: Case) -> tuple[list[float], float]:
    """Largest error of each column, and what is allowed; runs on the current CUDA device."""
    op, inputs = draw(case, 'cuda')
    errors = compare(getattr(kernels, op), getattr(reference, op), inputs)
    return errors, TOLERANCE[case.dtype] * (2 if op in ROUNDED_TWICE else 1)


def draw(case: Case, device: str) -> tuple[str, list]:
    """The operator's name, and arguments; tensors are leaves, as strided as drawn.

    Short ones are constants, and so are those of a tuple; one of one stands for its tensor.
    """
    op, make = DRAW[case.what]

    rng = torch.Generator().manual_seed(0)

    def rand(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype)

    def leaf(x: object) -> object:
        if isinstance(x, tuple):
            constants = tuple(t.to(device) if isinstance(t, Tensor) else t for t in x)
            return constants[0] if len(constants) == 1 else constants
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to(device)
        return x.requires_grad_() if x.ndim > 1 or x.numel() > 2 else x

    return op, [leaf(x) for x in make(rand, case.dtype, case.dims)]


def compare(function: Callable, definition: Callable, inputs: list) -> list[float]:
    """Largest errors of results and gradients against the definition in float64."""

    def double(x: object) -> object:
        if isinstance(x, torch.dtype):
            return torch.float64
        if isinstance(x, tuple):
            return tuple(double(t) for t in x)
        is_tensor = isinstance(x, Tensor)
        return x.detach().double().requires_grad_(x.requires_grad) if is_tensor else x

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = results_and_gradients(function, inputs)
    expected = results_and_gradients(definition, [double(x) for x in inputs])
    return [
        max((_error(x, y) for x, y in zip(xs, ys, strict=True)), key=lambda e: (e != e, e))
        for xs, ys in zip(actual, expected, strict=True)
    ]


def results_and_gradients(function: Callable, inputs: list) -> tuple[list[Tensor], list[Tensor]]:
    """Results with and without gradients, and gradients of a fixed weighting of them.

    The weights are random, so that sums of them over tokens, which the gradients of biases are, do
    not cancel, where rounding would be all that is left.
    """
    out = function(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    with torch.no_grad():
        again = function(*inputs)
    total = 0
    for x in outs:
        rng = torch.Generator().manual_seed(x.numel())
        weights = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.device)
        total = total + (x.double() * weights).sum()
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    again = again if isinstance(again, tuple) else (again,)
    return [*(x.detach() for x in outs), *again], list(torch.autograd.grad(total, leaves))


def _error(x: Tensor, y: Tensor) -> float:
    """||x - y|| / ||y||; NaN stays NaN, which passes no comparison."""
    return ((x.double() - y).norm() / y.norm()).item()
