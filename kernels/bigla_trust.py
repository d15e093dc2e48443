"""Whether the fused `bidirectional_gla` is right on this machine: a self-check at first use."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmvig.kernels import bigla_chunked

# Largest ||x - reference|| / ||reference|| of the output and of each gradient, by dtype of q, k, v.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-4}
NAMES = ('o', 'dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd')


def trusted(
    device: torch.device, dtype: torch.dtype, gate_dtype: torch.dtype, dk: int, dv: int
) -> bool:
    """Whether the kernel passed its self-check for such inputs; runs it once per process.

    While a CUDA graph is captured nothing may synchronize: what was not checked before is then
    taken to be right.
    """
    if torch.cuda.is_current_stream_capturing():
        return True
    return _checked(device, dtype, gate_dtype, dk, dv)


@lru_cache
def _checked(
    device: torch.device, dtype: torch.dtype, gate_dtype: torch.dtype, dk: int, dv: int
) -> bool:
    fault = in_fresh_thread(find_fault, device, dtype, gate_dtype, dk, dv)
    if fault is not None:
        import triton

        warnings.warn(
            f'bidirectional_gla: the Triton kernel is wrong on this machine for {dtype}, key dim '
            f'{dk}, value dim {dv} ({fault}; {torch.cuda.get_device_name(device)}, PyTorch '
            f'{torch.__version__}, Triton {triton.__version__}); using the slower PyTorch path. '
            'Run python -m mmvig.doctor for details',
            RuntimeWarning,
            stacklevel=2,
        )
    return fault is None


def in_fresh_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function with autograd as usual, on the current CUDA stream.

    Inside an operator PyTorch has taken autograd out of this thread's dispatch; `enable_grad`
    does not bring it back, another thread has it.
    """
    stream = torch.cuda.current_stream()

    def call() -> Any:
        with torch.cuda.stream(stream):
            return function(*args)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def find_fault(
    device: torch.device, dtype: torch.dtype, gate_dtype: torch.dtype, dk: int, dv: int
) -> str | None:
    """What is wrong with the kernel for such inputs, in words; None where it is right."""
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        return 'it needs compute capability 8.0'
    try:
        # One segment, then several; with the gates of a network, then with strong ones.
        for n, gate in ((150, 0.05), (600, 0.05), (100, 20.0)):
            errors = measure(draw(1, n, 2, dk, dv, gate, dtype, gate_dtype, device))
            for name, error in zip(NAMES, errors, strict=True):
                if not error <= TOLERANCE[dtype]:
                    return f'error {error:.1e} of {name} at {n} tokens and gates of -{gate}'
    except Exception as e:  # a compiler may fail in many ways, and none may stop the training
        return f'{type(e).__name__}: {str(e)[:200]}'
    return None


def draw(
    b: int,
    n: int,
    h: int,
    dk: int,
    dv: int,
    gate: float,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Random q, k, v, log gates between 0 and about -2 `gate`, and the output's gradient."""
    rng = torch.Generator().manual_seed(n)
    xs = [torch.randn(b, n, h, d, generator=rng) for d in (dk, dk, dv, dv)]
    gates = [-2 * gate * torch.rand(b, n, h, dk, generator=rng) for _ in range(2)]
    # Strong gates alternate with weak ones, so that something is left to be wrong.
    gates = [g * (torch.arange(n) % 4 == 0)[:, None, None] if gate > 1 else g for g in gates]
    q, k, v, do = (x.to(device, dtype) for x in xs)
    return [q, k, v, *(g.to(device, gate_dtype) for g in gates), do]


def measure(args: list[Tensor]) -> list[float]:
    """Errors of the kernel's output and five gradients against float64, as RMS ratios."""
    from mmvig.kernels.bigla_bwd import backward
    from mmvig.kernels.bigla_fwd import forward

    *inputs, do = args
    scale = inputs[0].shape[-1] ** -0.5
    with torch.enable_grad():
        leaves = [x.detach().cpu().double().requires_grad_() for x in inputs]
        reference = bigla_chunked.bidirectional_gla(*leaves, scale)
        expected = [reference, *torch.autograd.grad(reference, leaves, do.cpu().double())]
    found = [forward(*inputs, scale), *backward(*inputs, do, scale)]
    return [
        ((x.cpu().double() - y.detach()).norm() / y.detach().norm()).item()
        for x, y in zip(found, expected, strict=True)
    ]
