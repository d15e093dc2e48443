"""How a `bidirectional_gla` problem is cut: chunk, segment, blocks, warps, dtypes of products."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Plan:
    """Launch parameters; see `make_plan`."""

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


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 for the interpreter on the CPU."""
    if device.type != 'cuda':
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def make_plan(
    b: int, n: int, h: int, dk: int, dv: int, dtype: torch.dtype, device: torch.device
) -> Plan:
    """Chooses the launch parameters from the problem's size."""
    half = dtype == torch.bfloat16
    large = half and dk <= 32
    chunk = 64 if large else 32
    # Few long segments store few states; enough of them keep every multiprocessor busy.
    n_chunks = triton.cdiv(n, chunk)
    wanted = triton.cdiv(2 * processors(device), b * h)
    chunks = max(1, min(16, triton.next_power_of_2(triton.cdiv(n_chunks, wanted) + 1) // 2))
    return Plan(
        chunk=chunk,
        chunks=n_chunks if wanted == 1 and n_chunks <= 16 else chunks,
        block_k=max(16, triton.next_power_of_2(dk)),
        block_v=64 if dv > 32 else max(16, triton.next_power_of_2(dv)),
        op=tl.bfloat16 if half else tl.float32,
        torch_op=torch.bfloat16 if half else torch.float32,
        precision='tf32x3' if dtype == torch.float32 else 'tf32',
        # One stage is miscompiled by Triton 3.6 where the products are Hopper's wgmma.
        reduce=dict(num_warps=4, num_stages=3 if half else 2),
        output=dict(num_warps=4, num_stages=3 if half else 2),
        grad=dict(num_warps=4, num_stages=2),
    )
