"""Triton kernel and launcher of `channels_last`."""

import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div
from mmvig.kernels.launch import await_previous, kernel

BLOCK, WARPS = 1024, 4


@kernel(sizes=['pixels', 'blocks'])
def channels_last_kernel(
    p_x, p_out, pixels, blocks, x_b, x_c, out_b, CIN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (B, pixels, CIN), images out_b apart, of planes x (B, CIN, pixels), rounded to out.

    A program does BLOCK numbers of one of so many `blocks` an image. Only the last one of an image
    has a mask, for which a thread would else write number by number.
    """
    await_previous()
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    p_x += b * x_b
    p_out += b * out_b
    at = block * BLOCK + tl.arange(0, BLOCK)
    p_from = p_x + (at % CIN).to(tl.int64) * x_c + at // CIN
    if block * BLOCK + BLOCK <= pixels * CIN:
        tl.store(p_out + at, tl.load(p_from).to(p_out.dtype.element_ty))
    else:
        mask = at < pixels * CIN
        tl.store(p_out + at, tl.load(p_from, mask=mask).to(p_out.dtype.element_ty), mask=mask)


def launch(x: Tensor, out: Tensor) -> None:
    """x (B, CIN, H, W), every plane contiguous, to out of that shape, images channels last."""
    b, cin, h, w = x.shape
    blocks = ceil_div(h * w * cin, BLOCK)
    channels_last_kernel[(b * blocks,)](
        x, out, h * w, blocks, *x.stride()[:2], out.stride(0), CIN=cin, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
