import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

from . import reference
from .checks import check

SHAPES = [(4, 5), (2, 3), (1, 1)]
# The kernel's own tests hold its precision; here it may also be the plain form, in half precision.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_ms_deform_attn(dtype: torch.dtype, device: str) -> None:
    shapes = torch.tensor(SHAPES, device=device)
    starts = torch.tensor([0, 20, 26], device=device)

    def op(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    def formula(
        value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return reference.ms_deform_attn(value, locations, weights, SHAPES)

    # Inside and outside; no location near a pixel's centre, where the derivative jumps.
    cells = torch.randint(-1, 6, (2, 3, 2, 3, 2, 2)) + 0.25 + 0.5 * torch.rand(2, 3, 2, 3, 2, 2)
    sizes = torch.tensor(SHAPES)[:, None].flip(-1)
    value, weights = torch.randn(2, 27, 2, 4), torch.rand(2, 3, 2, 3, 2)
    locations = (cells + 0.5) / sizes
    tolerance = TOLERANCE[dtype]
    check(op, formula, [value, locations, weights], dtype, device, tolerance)


def test_result_keeps_its_dtype_under_autocast() -> None:
    shapes, starts = torch.tensor([(2, 2)]), torch.tensor([0])
    value = torch.randn(1, 4, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    locations, weights = torch.rand(1, 3, 1, 1, 2, 2), torch.rand(1, 3, 1, 1, 2)
    with torch.autocast('cpu', torch.bfloat16):
        out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    out.sum().backward()
    assert out.dtype == value.grad.dtype == torch.bfloat16
