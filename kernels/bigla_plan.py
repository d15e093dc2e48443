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
    reduce_warps: int
    output_warps: int
    grad_warps: int


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
    block_v = 64 if dv % 64 == 0 or dv > 64 else max(16, triton.next_power_of_2(dv))
    chunk = 64 if dk <= 32 and half else 32
    return Plan(
        chunk=chunk,
        chunks=4,
        block_k=max(16, triton.next_power_of_2(dk)),
        block_v=block_v,
        op=tl.bfloat16 if half else tl.float32,
        torch_op=torch.bfloat16 if half else torch.float32,
        precision={torch.float32: 'tf32x3'}.get(dtype, 'tf32'),
        reduce_warps=4,
        output_warps=4,
        grad_warps=4,
    )
