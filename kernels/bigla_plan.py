"""How a `bidirectional_gla` problem is cut: chunk, segment, blocks, warps, dtypes of products."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, multiprocessors, power_of_2

# Programs that a multiprocessor of Hopper holds at once, limited by registers.
RESIDENT = 2
MAX_CHUNKS = 48
# Up to so many key channels the forward multiplies bfloat16 as TF32: ViG-H amplifies its rounding.
TF32_DIM = 16


@dataclass(frozen=True)
class Plan:
    """Launch parameters; see `make_plan`.

    Attributes:
        chunk: Tokens of a chunk, whose scores are one tile.
        chunks: Chunks of a segment, which one program walks.
        block_k: Key dim, rounded up to a power of two.
        block_v: Value channels of one program.
        op, torch_op: Dtype of the operands of products, for Triton and PyTorch.
        precision: Triton's `input_precision` of products.
        reduce, output, grad, exact: Warps and pipeline stages of the kernels; exact, of the output
            and gradient kernels in their exact form.
    """

    chunk: int
    chunks: int
    block_k: int
    block_v: int
    op: tl.dtype
    torch_op: torch.dtype
    precision: str
    reduce: dict[str, int]
    output: dict[str, int]
    grad: dict[str, int]
    exact: dict[str, int]


def make_plan(
    q: Tensor, v: Tensor, chunk: int | None = None, chunks: int | None = None, grads: bool = False
) -> Plan:
    """Chooses the launch parameters for q (B, N, H, K) and v (B, N, H, V).

    Args:
        q, v: As in `bidirectional_gla`.
        chunk, chunks: Tokens of a chunk and chunks of a segment, if they are not to be chosen.
        grads: Whether for the backward.
    """
    plan = plan_for(*q.shape, v.shape[-1], q.dtype, q.device, grads)
    if chunk is None and chunks is None:
        return plan
    return replace(plan, chunk=chunk or plan.chunk, chunks=chunks or plan.chunks)


@lru_cache(maxsize=1024)
def plan_for(
    b: int, n: int, h: int, dk: int, dv: int, dtype: torch.dtype, device: torch.device, grads: bool
) -> Plan:
    """As `make_plan`; remembered, since small calls wait for the host."""
    half = dtype == torch.bfloat16 and (grads or dk > TF32_DIM)
    # As large as registers and shared memory allow; TF32 and its threefold use take more. Scores of
    # 64 tokens in TF32, which float16 would have at key dim 16, fault on Hopper (Triton 3.6).
    size = dk * {torch.bfloat16: 1, torch.float16: 2, torch.float32: 4}[dtype]
    chunk = 64 if half and size <= 32 else 32 if size <= 64 else 16
    block_v = min(32 if chunk == 16 and dk > 32 else 64, max(16, power_of_2(dv)))
    heads = b * h * ceil_div(dv, block_v)
    return Plan(
        chunk=chunk,
        chunks=choose_chunks(ceil_div(n, chunk), heads, RESIDENT * multiprocessors(device)),
        block_k=max(16, power_of_2(dk)),
        block_v=block_v,
        # float16 has too little range for the factors of a decay; TF32 has its precision.
        op=tl.bfloat16 if half else tl.float32,
        torch_op=torch.bfloat16 if half else torch.float32,
        precision='tf32x3' if dtype == torch.float32 else 'tf32',
        # One stage is miscompiled by Triton 3.6 where the products are Hopper's wgmma.
        reduce=dict(num_warps=4, num_stages=3 if half else 2),
        output=dict(num_warps=4, num_stages=3 if half else 2),
        grad=dict(num_warps=4, num_stages=2),
        # Two warps are too few for wgmma, which that form does not survive in the gradients.
        # Told no number, ptxas gives the gradients 32 registers and 17 KB of stack a thread, for
        # which the driver sets aside 4.5 GB on an H200 (by count); with all registers it is 5 KB.
        exact=dict(num_warps=2, num_stages=1, maxnreg=255),
    )


def duration(programs: int, slots: int, chunks: int, overhead: int) -> int:
    """How long programs take, in chunks of one.

    They run in rounds of as many as a device holds at once, `slots`, and each walks its `chunks`
    and does what is worth `overhead` more.
    """
    return ceil_div(programs, slots) * (chunks + overhead)


def choose_chunks(n_chunks: int, heads: int, slots: int) -> int:
    """Chunks of a segment that fill a device which runs `slots` programs at once.

    A program costs about one chunk more for its states, and a sequence of several segments half as
    much again to reduce and scan them.
    """

    def cost(chunks: int) -> float:
        segments = ceil_div(n_chunks, chunks)
        return duration(heads * segments, slots, chunks, 1) * (1.5 if segments > 1 else 1)

    sizes = [*range(1, min(n_chunks, MAX_CHUNKS) + 1)]
    return min(sizes, key=cost)
