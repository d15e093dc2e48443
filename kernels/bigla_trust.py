"""Whether the fused `bidirectional_gla` is right on this machine: a self-check at first use."""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import torch
from torch import Tensor

from mmvig.kernels import bigla_chunked

# Largest ||x - reference|| / ||reference|| of the output and of each gradient, by dtype of q, k, v.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-4}
NAMES = ('o', 'dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd')
# Tokens, typical log gate, chunks of a segment: many segments, one, and strong gates.
CASES = ((200, -0.05, 1), (200, -0.05, 100), (200, -20.0, 2))


def trusted(
    device: torch.device,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    dk: int,
    dv: int,
    gradients: bool,
) -> bool:
    """Whether the kernels passed their self-check for such inputs; runs it once per process.

    With gradients the forward is checked, too. A failure is reported once for such inputs.

    While a CUDA graph is captured nothing may synchronize: what was not checked before is then
    taken to be right.
    """
    if torch.cuda.is_current_stream_capturing():
        return True
    return _checked(device, dtype, gate_dtype, dk, dv, gradients)


@lru_cache
def _checked(
    device: torch.device,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    dk: int,
    dv: int,
    gradients: bool,
) -> bool:
    fault = find_fault(device, dtype, gate_dtype, dk, dv, gradients)
    if fault is not None:
        _warn_once(device, dtype, dk, dv, fault)
    return fault is None


# Inputs whose kernels were found wrong and warned of.
_warned: set[tuple[torch.device, torch.dtype, int, int]] = set()


def _warn_once(device: torch.device, dtype: torch.dtype, dk: int, dv: int, fault: str) -> None:
    import triton

    if (device, dtype, dk, dv) in _warned:
        return
    _warned.add((device, dtype, dk, dv))
    warnings.warn(
        f'bidirectional_gla: the Triton kernel is wrong on this machine for {dtype}, key dim '
        f'{dk}, value dim {dv} ({fault}; {torch.cuda.get_device_name(device)}, PyTorch '
        f'{torch.__version__}, Triton {triton.__version__}); using the slower PyTorch path. '
        'Run python -m mmvig.doctor for details',
        RuntimeWarning,
        stacklevel=2,
    )


def find_fault(
    device: torch.device,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    dk: int,
    dv: int,
    gradients: bool = True,
) -> str | None:
    """What is wrong with the kernels for such inputs, in words; None where they are right."""
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        return 'it needs compute capability 8.0'
    return search_fault(partial(measure, gradients=gradients), device, dtype, gate_dtype, dk, dv)


def search_fault(
    measure_errors: Callable[[list[Tensor], int], dict[str, float]],
    device: torch.device,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    dk: int,
    dv: int,
) -> str | None:
    """The first error of any case that is too large, in words, or what was raised; else None.

    measure_errors takes what `draw` returns and the chunks of a segment, as `measure` does. It runs
    in a thread of its own, where no mode of the caller's holds: a compiled graph watches the
    operators of its first call, inference knows no gradients, autocast casts.
    """

    def search() -> str | None:
        with torch.cuda.device(device if device.type == 'cuda' else -1):
            for n, gate, chunks in CASES:
                args = draw(1, n, 2, dk, dv, gate, dtype, gate_dtype, device)
                for name, error in measure_errors(args, chunks).items():
                    if not error <= TOLERANCE[dtype]:
                        return f'error {error:.1e} of {name} at {n} tokens and log gates of {gate}'
        return None

    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(search).result()
        except Exception as e:  # a compiler may fail in many ways, and none may stop the training
            return f'{type(e).__name__}: {str(e)[:200]}'


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
    """Random q, k, v, log gates between 0 and 2 `gate`, and the output's gradient."""
    rng = torch.Generator().manual_seed(n)
    xs = [torch.randn(b, n, h, d, generator=rng) for d in (dk, dk, dv, dv)]
    gates = [2 * gate * torch.rand(b, n, h, dk, generator=rng) for _ in range(2)]
    # Strong gates alternate with weak ones, so that something is left to be wrong.
    rare = (torch.arange(n) % 4 == 0)[:, None, None]
    gates = [g * rare if gate < -1 else g for g in gates]
    q, k, v, do = (x.to(device, dtype) for x in xs)
    return [q, k, v, *(g.to(device, gate_dtype) for g in gates), do]


def measure(args: list[Tensor], chunks: int, gradients: bool = True) -> dict[str, float]:
    """Errors ||x - y|| / ||y|| of output and gradients, by name, y in float64.

    args are q, k, v, both gates and the output's gradient; segments have `chunks` chunks.
    """
    from mmvig.kernels.bigla_bwd import backward
    from mmvig.kernels.bigla_fwd import forward

    *inputs, do = args
    scale = inputs[0].shape[-1] ** -0.5
    # torch.func also works inside an operator, where PyTorch has autograd switched off
    reference, pull_back = torch.func.vjp(
        partial(bigla_chunked.bidirectional_gla, scale=scale), *(x.cpu().double() for x in inputs)
    )
    grads = pull_back(do.cpu().double()) if gradients else ()
    found = [forward(*inputs, scale, chunks=chunks)]
    if gradients:
        found += backward(*inputs, do, scale, chunks=chunks)
    return relative_errors(NAMES[: len(found)], found, (reference, *grads))


def relative_errors(
    names: Sequence[str], found: Sequence[Tensor], expected: Sequence[Tensor]
) -> dict[str, float]:
    """||x - y|| / ||y|| by name, y in float64 on the CPU."""
    return {
        name: ((x.cpu().double() - y).norm() / y.norm()).item()
        for name, x, y in zip(names, found, expected, strict=True)
    }
