"""`bidirectional_gla` beside its PyTorch form, FLA's `chunk_gla` and softmax attention.

bfloat16; key dim 32 and value dim 64, as the ViG networks have them; softmax attention with 64
dims a head, as ViT has it in the same place.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Contender
from mmvig.kernels import bidirectional_gla, bigla_chunked

K, V = 32, 64
# Batch, heads, tokens.
CASES = {
    'det tiny': (2, 3, 4200),
    'det base': (2, 12, 4200),
    'seg base': (4, 12, 1024),
    '224 px base': (256, 12, 196),
    '2048 px base': (2, 12, 16384),
    '4096 px base': (1, 12, 65536),
}
ROWS = 32  # of softmax attention that are checked


def traffic(case: str) -> tuple[int, int]:
    """Bytes that the forward, and forward and backward, must move: each tensor once, in bfloat16.

    The forward reads q, k, v and two gates and writes the output; the backward reads those and the
    output's gradient and writes five gradients.
    """
    b, h, n = CASES[case]
    forward = 2 * b * h * n * (4 * K + 2 * V)
    return forward, forward + 2 * b * h * n * (8 * K + 3 * V)


def l2_traffic(case: str) -> None:
    """Not counted: what is read again is read a few times, in order."""


def contenders(case: str) -> Iterator[Contender]:
    """Everything that is measured on a case; inputs are random, gates those of a fresh network.

    FLA comes last: its first call searches block sizes for minutes.
    """
    b, h, n = CASES[case]
    inputs = _draw(b, n, h)
    check = _gla_errors(inputs)
    yield Contender('mmvig', bidirectional_gla, inputs, check, 2e-2)
    yield Contender('mmvig, PyTorch', bigla_chunked.bidirectional_gla, inputs, check, 2e-2)
    qkv = [torch.randn(b, h, n, V, device='cuda', dtype=torch.bfloat16) for _ in range(3)]
    qkv = [x.requires_grad_() for x in qkv]
    for name, backend in (
        ('flash attention', SDPBackend.FLASH_ATTENTION),
        ('cuDNN attention', SDPBackend.CUDNN_ATTENTION),
    ):
        yield Contender(name, _attention(backend), qkv, _attention_errors(qkv), 2e-2)
    yield Contender('FLA chunk_gla', _fla, inputs, check, 2e-2)


def _draw(b: int, n: int, h: int) -> list[Tensor]:
    """q, k, v and log gates."""
    rand = torch.randn(b, n, h, 4 * K + V, device='cuda')
    q, k, v, fwd, bwd = rand.split([K, K, V, K, K], dim=-1)
    gates = (F.logsigmoid(g) / 16 for g in (fwd, bwd))
    return [x.to(torch.bfloat16).contiguous().requires_grad_() for x in (q, k, v, *gates)]


def _gla_errors(inputs: list[Tensor]) -> Callable[..., list[float]]:
    """Compares with the PyTorch path in float32, whose own tests compare it with float64."""

    def errors(out: Tensor, grads: tuple[Tensor, ...], grad: Tensor) -> list[float]:
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        expected = bigla_chunked.bidirectional_gla(*leaves)
        wanted = (expected, *torch.autograd.grad(expected, leaves, grad.float()))
        return [_error(x, y) for x, y in zip((out, *grads), wanted, strict=True)]

    return errors


def _error(x: Tensor, y: Tensor) -> float:
    """||x - y|| / ||y||; NaN stays NaN, which passes no comparison."""
    return ((x.float() - y).norm() / y.norm()).item()


def _fla(q: Tensor, k: Tensor, v: Tensor, fwd: Tensor, bwd: Tensor) -> Tensor:
    """Both directions as one batch, the second one flipped."""
    from fla.ops.gla import chunk_gla

    q, k, v = (torch.cat([x, x.flip(1)]) for x in (q, k, v))
    out, _ = chunk_gla(q, k, v, torch.cat([fwd, bwd.flip(1)]))
    first, second = out.chunk(2)
    return (first + second.flip(1)) / 2


def _attention(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _attention_errors(qkv: list[Tensor]) -> Callable[..., list[float]]:
    """Checks the output and the gradient of q in some rows, which dense attention can afford."""

    def errors(out: Tensor, grads: tuple[Tensor, ...], grad: Tensor) -> list[float]:
        q, k, v = (x.detach().float() for x in qkv)
        rows = torch.randint(q.shape[2], (ROWS,), device=q.device)
        q = q[:, :, rows].requires_grad_()
        expected = (q @ k.mT * V**-0.5).softmax(-1) @ v
        (dq,) = torch.autograd.grad(expected, q, grad[:, :, rows].float())
        return [_error(out[:, :, rows], expected), _error(grads[0][:, :, rows], dq)]

    return errors
