"""`ms_deform_attn` beside its PyTorch form and mmcv's compiled operator, at the adapter's sizes.

Detection at 1344x800, batch 2, a trunk of stride 16. Locations are uniform over the maps, the worst
case for every cache, or around each query's own position, as in training. Locations and weights are
float32 throughout, as the adapter has them under autocast.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from benchmarks.timing import Contender
from mmvig.doctor.ms_deform_attn import error, with_gradients
from mmvig.kernels import ms_deform_attn, reference

BATCH, POINTS = 2, 4
PYRAMID, TRUNK = [(100, 168), (50, 84), (25, 42)], [(50, 84)]
# Of a float32 coordinate of up to 168 pixels, the rounding alone is up to 8e-6 pixels.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 5e-5}


@dataclass(frozen=True)
class Case:
    """Queries at the pixels of some maps, samples from others."""

    queries: list[tuple[int, int]]
    levels: list[tuple[int, int]]
    heads: int
    head_dim: int
    dtype: torch.dtype
    own_position: bool

    @property
    def samples(self) -> int:
        """Of all queries, heads, levels and points."""
        return BATCH * _pixels(self.queries) * self.heads * len(self.levels) * POINTS


def _pixels(maps: list[tuple[int, int]]) -> int:
    return sum(map(prod, maps))


def _cases() -> Iterator[tuple[str, Case]]:
    """The adapter's two directions in its largest and smallest size."""
    for place in ('', ', own position'):
        for size, heads, head_dim in (('base', 12, 64), ('tiny', 6, 32)):
            for name, dtype in (('bf16', torch.bfloat16), ('fp32', torch.float32)):
                dims = (heads, head_dim, dtype, bool(place))
                yield f'injector {size} {name}{place}', Case(TRUNK, PYRAMID, *dims)
                yield f'extractor {size} {name}{place}', Case(PYRAMID, TRUNK, *dims)


CASES = dict(_cases())


def traffic(case: str) -> tuple[int, int]:
    """Bytes that the forward, and forward and backward, must move: each tensor once.

    The forward reads value, locations and weights and writes the output; the backward reads those
    and the output's gradient and writes three gradients.
    """
    c = CASES[case]
    channels = BATCH * c.heads * c.head_dim * c.dtype.itemsize
    value, output = channels * _pixels(c.levels), channels * _pixels(c.queries)
    points = c.samples * 3 * torch.float32.itemsize
    forward = value + points + output
    return forward, 2 * forward + value + points


def l2_traffic(case: str) -> tuple[int, int]:
    """Bytes that the forward, and forward and backward, ask of the caches: corners x channels.

    The backward reads every sample's four corners again, and the output's gradient for it in the
    two rows of tokens next to it, each by 17 / 16 programs on average.
    """
    c = CASES[case]
    row = c.samples * c.head_dim * c.dtype.itemsize
    return 4 * row, 8 * row + 2 * row * 17 // 16


def contenders(case: str) -> Iterator[Contender]:
    """Everything that is measured on a case."""
    c = CASES[case]
    shapes = torch.tensor(c.levels, device='cuda')
    sizes = shapes.prod(-1)
    levels = (shapes, sizes.cumsum(0) - sizes)
    value, weights = _draw(c)
    inputs = [value, _locations(c, shapes), weights]
    inputs = [x.requires_grad_() for x in inputs]
    check, tolerance = _errors(inputs, levels), TOLERANCE[c.dtype]
    for name, function in (
        ('mmvig', ms_deform_attn),
        ('mmvig, deterministic', _deterministic),
        ('PyTorch', reference.ms_deform_attn),
        ('mmcv, compiled', _mmcv),
    ):
        yield Contender(name, _with_levels(function, levels), inputs, check, tolerance)


def _draw(c: Case) -> tuple[Tensor, Tensor]:
    """Value and weights."""
    shape = (BATCH, _pixels(c.queries), c.heads, len(c.levels) * POINTS)
    weights = torch.randn(shape, device='cuda').softmax(-1).unflatten(-1, (-1, POINTS))
    value = torch.randn(BATCH, _pixels(c.levels), c.heads, c.head_dim, device='cuda')
    return value.to(c.dtype), weights


def _locations(c: Case, shapes: Tensor) -> Tensor:
    """Uniform, or some pixels off the query's position; never near a kink of the derivative."""
    shape = (BATCH, _pixels(c.queries), c.heads, len(c.levels), POINTS, 2)
    sizes = shapes.flip(-1)[:, None]
    if c.own_position:
        centers = torch.cat([_centers(h, w) for h, w in c.queries])[:, None, None, None]
        distance = torch.arange(1, POINTS + 1, device='cuda')[:, None]
        pixels = centers * sizes - 0.5 + distance * torch.randn(shape, device='cuda')
    else:
        pixels = torch.rand(shape, device='cuda') * sizes - 0.5
    pixels = pixels.floor() + 0.05 + 0.9 * (pixels - pixels.floor())
    return (pixels + 0.5) / sizes


def _centers(height: int, width: int) -> Tensor:
    """(height * width, 2): (x, y) of each pixel's centre, 0 to 1."""
    y = (torch.arange(height, device='cuda') + 0.5) / height
    x = (torch.arange(width, device='cuda') + 0.5) / width
    return torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], -1).flatten(0, 1)


def _with_levels(
    function: Callable[..., Tensor], levels: tuple[Tensor, Tensor]
) -> Callable[..., Tensor]:
    return lambda value, locations, weights: function(value, *levels, locations, weights)


def _errors(inputs: list[Tensor], levels: tuple[Tensor, Tensor]) -> Callable[..., list[float]]:
    """Compares with the definition in float64."""

    def errors(out: Tensor, grads: tuple[Tensor, ...], grad: Tensor) -> list[float]:
        value, locations, weights = (x.double() for x in inputs)
        args = [value, *levels, locations, weights, grad.double()]
        expected = with_gradients(reference.ms_deform_attn, args)
        return [error(x, y) for x, y in zip((out, *grads), expected, strict=True)]

    return errors


def _deterministic(*args: Tensor) -> Tensor:
    """With `torch.use_deterministic_algorithms` set during the backward, which alone asks."""
    out = ms_deform_attn(*args)
    if out.grad_fn is not None:
        out.grad_fn.register_prehook(lambda *_: torch.use_deterministic_algorithms(True))
        out.grad_fn.register_hook(lambda *_: torch.use_deterministic_algorithms(False))
    return out


def _mmcv(*args: Tensor) -> Tensor:
    if importlib.util.find_spec('mmcv._ext').origin == 'mmvig.mmcv_ext':
        raise ImportError('mmcv has no compiled operators here')
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    return MultiScaleDeformableAttnFunction.apply(*args, BATCH)
