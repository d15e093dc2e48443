"""Backward of `bidirectional_gla` in Triton: which of its two forms a call takes.

`bigla_bwd_chunks.py` computes one chunk a program and is faster, but has been compared and timed on
a GPU for the one case that the ViG networks have in half precision. `bigla_bwd_looped.py` walks a
segment a program and takes everything else.
"""

import warnings
from functools import partial

import torch
from torch import Tensor

from mmvig.kernels import bigla_chunked
from mmvig.kernels.bigla_bwd_chunks import backward_by_chunks
from mmvig.kernels.bigla_bwd_looped import backward_looped
from mmvig.kernels.bigla_plan import Plan
from mmvig.kernels.bigla_trust import NAMES, relative_errors, search_fault

KEY_DIM, VALUE_DIM, DTYPE = 32, 64, torch.bfloat16

# Devices on which the form by chunks was compared with float64, and what came out.
_right: dict[torch.device, bool] = {}


def backward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward: gradients of q, k, v and both gates, each in its tensor's dtype.

    Args:
        q, k, v, gf, gb, do: As in `bidirectional_gla`, and the output's gradient, (B, N, H, V);
            last dims contiguous.
        scale: Factor of q.
        plan: Launch parameters, of which the form by chunks heeds `chunks` only.
    """
    inputs = (q, k, v, gf, gb, do)
    if q.is_cuda and _fits(*inputs) and _is_right(q.device):
        return backward_by_chunks(*inputs, scale, chunks=plan.chunks if plan else None)
    return backward_looped(*inputs, scale, plan)


def _fits(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor) -> bool:
    """Whether these are compiled to what was compared: dtypes, dims, rows aligned to 16 bytes."""
    inputs = (q, k, v, gf, gb, do)
    return (
        q.shape[-1] == KEY_DIM
        and v.shape[-1] == VALUE_DIM
        and all(x.dtype == DTYPE and x.data_ptr() % 16 == 0 for x in inputs)
        and all(stride % 16 == 0 for x in inputs for stride in x.stride()[:3])
    )


def _is_right(device: torch.device) -> bool:
    """Whether the form by chunks passed its check, which runs once per process.

    Not while a CUDA graph is captured, when nothing may synchronize: what was not checked before
    then takes the other form.
    """
    if device not in _right:
        if torch.cuda.is_current_stream_capturing():
            return False
        fault = find_fault(device)
        _right[device] = fault is None
        if fault is not None:
            warnings.warn(
                f'bidirectional_gla: the backward by chunks is wrong on this machine ({fault}); '
                'using the slower one by segments',
                RuntimeWarning,
                stacklevel=2,
            )
    return _right[device]


def find_fault(device: torch.device) -> str | None:
    """What is wrong with the form by chunks, in words; None where it is right."""
    return search_fault(_measure, device, DTYPE, DTYPE, KEY_DIM, VALUE_DIM)


def _measure(args: list[Tensor], chunks: int) -> dict[str, float]:
    """Errors ||x - y|| / ||y|| of the gradients, by name, y in float64."""
    scale = KEY_DIM**-0.5
    *inputs, do = (x.cpu().double() for x in args)
    # torch.func also works inside an operator, where PyTorch has autograd switched off
    _, pull_back = torch.func.vjp(partial(bigla_chunked.bidirectional_gla, scale=scale), *inputs)
    found = backward_by_chunks(*args, scale, chunks=chunks)
    return relative_errors(NAMES[1:], found, pull_back(do))
