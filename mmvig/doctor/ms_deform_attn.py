"""Checks of `ms_deform_attn`: every dtype and head dim, output and all three gradients."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmvig.kernels import reference

NAME = 'ms_deform_attn'
COLUMNS = ('out', 'value', 'value det', 'location', 'weight')
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEAD_DIMS = (8, 16, 24, 32, 48, 64, 96, 128, 160, 256)
# Largest ||x - y|| / ||y||, by dtype of value: of float32, the rounding of coordinates; of half
# precision, that of each result, and in the gradient to value that of each sample's weight.
TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 6e-3}
# Sides are powers of two: pixel centres and edges are then exact in half precision.
LEVELS = [(8, 16), (4, 4), (0, 3), (1, 2), (1, 1)]


def _smooth(locations: Tensor, sizes: Tensor) -> Tensor:
    """Moves locations away from rows and columns of pixels, where derivatives jump."""
    pixels = locations * sizes - 0.5
    pixels = pixels.floor() + 0.05 + 0.9 * (pixels - pixels.floor())
    return (pixels + 0.5) / sizes.clamp(min=1)


def _on_border(shape: Sequence[int], sizes: Tensor) -> Tensor:
    """x, y or both on an edge of the map, half a pixel beyond the outer pixels' centres."""
    locations = _smooth(torch.rand(*shape), sizes)
    locations[torch.rand(*shape) < 0.4] = 0
    locations[torch.rand(*shape) < 0.4] = 1
    return locations


def _on_grid(shape: Sequence[int], sizes: Tensor) -> Tensor:
    """On pixel centres, from one pixel outside the map to another; exact for powers of two."""
    pixels = (torch.rand(*shape) * (sizes + 2)).floor() - 1
    return (pixels + 0.5) / sizes.clamp(min=1)


# (B, Q, H, L, P, 2) and (width, height) of the levels to locations.
KINDS: dict[str, Callable[[Sequence[int], Tensor], Tensor]] = {
    'random': lambda shape, sizes: _smooth(1.2 * torch.rand(*shape) - 0.1, sizes),
    'clustered': lambda shape, sizes: _smooth(0.37 + 0.02 * torch.rand(*shape), sizes),
    'on border': _on_border,
    'far outside': lambda shape, sizes: _smooth(5 * torch.randn(*shape), sizes),
    'integer grid': _on_grid,
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    dtype: torch.dtype
    point_dtype: torch.dtype
    head_dim: int

    def __str__(self) -> str:
        points = '' if self.point_dtype == self.dtype else f', {_short(self.point_dtype)} points'
        return f'{_short(self.dtype)}{points}, {self.head_dim}'


def cases(quick: bool) -> Iterator[Case]:
    """All head dims; the adapter's alone if `quick`."""
    for dtype, points in ((BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32)):
        for head_dim in (32, 64) if quick else HEAD_DIMS:
            yield Case(dtype, points, head_dim)


def check(case: Case) -> tuple[list[float], float]:
    """Largest error of each column over all kinds of location, and what is allowed.

    Runs on the current CUDA device.
    """
    sizes = (2, 301, 3, case.head_dim, 4, LEVELS)
    errors = [measure(draw(kind, *sizes, case.dtype, case.point_dtype, 'cuda')) for kind in KINDS]
    # max() would lose a NaN.
    worst = [max(column, key=lambda e: (e != e, e)) for column in zip(*errors, strict=True)]
    return worst, TOLERANCE[case.dtype]


def draw(
    kind: str,
    b: int,
    q: int,
    h: int,
    d: int,
    p: int,
    levels: list[tuple[int, int]],
    dtype: torch.dtype,
    point_dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    """The five arguments and the output's gradient; `kind` as in `KINDS`."""
    shapes = torch.tensor(levels)
    sizes = shapes.prod(-1)
    shape = (b, q, h, len(levels), p)
    return [
        torch.randn(b, int(sizes.sum()), h, d).to(device, dtype),
        shapes.to(device),
        (sizes.cumsum(0) - sizes).to(device),
        KINDS[kind]((*shape, 2), shapes.flip(-1)[:, None]).to(device, point_dtype),
        torch.rand(shape).to(device, point_dtype),
        torch.randn(b, q, h * d).to(device, dtype),
    ]


def measure(inputs: list[Tensor]) -> list[float]:
    """Errors of the kernels, in the order of `COLUMNS`, as RMS ratios to float64."""
    from mmvig.kernels.ms_deform_attn_bwd import backward
    from mmvig.kernels.ms_deform_attn_fwd import forward

    *args, _ = inputs
    d_value, *d_points = backward(*inputs)
    exact, *_ = backward(*inputs, needs_points=False, deterministic=True)
    out, wanted, *wanted_points = expect(inputs)
    pairs = [(forward(*args), out), (d_value, wanted), (exact, wanted)]
    return [error(x, y) for x, y in [*pairs, *zip(d_points, wanted_points, strict=True)]]


def expect(inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients to value, locations and weights by the definition, in float64."""
    wide = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in inputs]
    return with_gradients(reference.ms_deform_attn, wide)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients to value, locations and weights."""
    value, shapes, starts, *points, grad = inputs
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (value, *points)]
        out = function(leaves[0], shapes, starts, *leaves[1:])
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def error(x: Tensor, y: Tensor) -> float:
    """||x - y|| / ||y||, where y is 0 throughout ||x||."""
    norm = y.norm()
    return ((x.to(y) - y).norm() / (norm if norm > 0 else 1)).item()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
