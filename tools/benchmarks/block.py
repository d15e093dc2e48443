"""Operators of ViG's block and of the adapter, beside PyTorch's for the same, eager or compiled.

bfloat16 with weights and the residual stream in float32, as under autocast.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Contender
from mmvig import kernels
from mmvig.kernels import reference

BF16, FP32 = torch.bfloat16, torch.float32
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """Batch, height and width of the map in tokens, channels, heads, hidden channels of the FFN."""

    batch: int
    hw: tuple[int, int]
    dims: int
    heads: int
    hidden: int

    def tokens(self, dims: int, dtype: torch.dtype = BF16) -> Tensor:
        """Random tokens, a leaf."""
        shape = (self.batch, self.hw[0] * self.hw[1], dims)
        return torch.randn(shape, device='cuda').to(dtype).requires_grad_()

    def map(self, up: int = 1, dtype: torch.dtype = BF16) -> Tensor:
        """A random map of the tokens' grid, or one with sides that many times as long, a leaf."""
        h, w = self.hw
        x = torch.randn(self.batch, up * h, up * w, self.dims, device='cuda').to(dtype)
        return x.permute(0, 3, 1, 2).requires_grad_()

    def image(self) -> Tensor:
        """A batch of random images, 16 times as long as the grid, channels last."""
        h, w = self.hw
        x = torch.randn(self.batch, 16 * h, 16 * w, 3, device='cuda')
        return x.to(BF16).permute(0, 3, 1, 2)


SIZES = {
    'det tiny': Size(2, (50, 84), 192, 3, 512),
    'det base': Size(2, (50, 84), 768, 12, 2048),
    '224 px tiny': Size(256, (14, 14), 192, 3, 512),
    '224 px base': Size(256, (14, 14), 768, 12, 2048),
}
OPS = (
    'swiglu', 'swiglu_product', 'residual_norm', 'gated_head_norm', 'depthwise_conv', 'log_gates',
)  # fmt: skip
ADAPTER_OPS = (
    'resized_sum', 'finest_map', 'batch_norm', 'sampling_points', 'stem_conv', 'patch_conv',
)  # fmt: skip
CASES = {f'{op}, {size}': (op, SIZES[size]) for size in SIZES for op in OPS}
CASES |= {f'{op}, det {a}': (op, SIZES[f'det {a}']) for a in ('tiny', 'base') for op in ADAPTER_OPS}


def _weight(*shape: int) -> Tensor:
    return torch.randn(shape, device='cuda', requires_grad=True)


def _draw(op: str, size: Size) -> tuple[list[Tensor], Callable[..., list]]:
    """Leaves, and what makes the operator's arguments of them."""
    c = size.dims
    if op == 'swiglu':
        return [size.tokens(2 * size.hidden)], lambda x: [x]
    if op == 'swiglu_product':  # with gradients a linear and `swiglu`
        weight = (c**-0.5 * torch.randn(2 * size.hidden, c, device='cuda')).to(BF16)
        return [size.tokens(c), weight.requires_grad_()], lambda *leaves: [*leaves]
    if op == 'residual_norm':
        leaves = [size.tokens(c, FP32), size.tokens(c), _weight(c)]
        return leaves, lambda x, y, w: [x, y, w, None, 1e-6, None, BF16]
    if op == 'gated_head_norm':
        leaves = [*(size.tokens(c) for _ in range(3)), *(_weight(c // size.heads) for _ in 'xl')]
        return [*leaves, _weight(c)], lambda *leaves: [*leaves, True]
    if op == 'depthwise_conv':
        leaves = [size.tokens(c), _weight(c, 1, 3, 3)]
        return leaves, lambda x, w: [x, w, [size.hw], None, 'silu']
    if op == 'batch_norm':  # as behind the stem, whatever the channels
        x = torch.randn(size.batch, 8 * size.hw[0], 8 * size.hw[1], 64, device='cuda').to(BF16)
        running = (torch.zeros(64, device='cuda'), torch.ones(64, device='cuda'))
        leaves = [x.permute(0, 3, 1, 2).requires_grad_(), _weight(64), _weight(64)]
        return leaves, lambda *leaves: _norm_arguments(running, *leaves)
    if op == 'stem_conv':  # the backward is cuDNN's
        image = size.image()
        return [_weight(64, 3, 3, 3)], lambda weight: [image, weight]
    if op == 'patch_conv':
        image, half = size.image(), c // 2
        return [_weight(half, 3, 9, 9), _weight(half)], lambda *leaves: [image, *leaves, 8, 1]
    if op == 'finest_map':  # with gradients `resized_sum` of its parts
        h, w = size.hw
        x = torch.randn(size.batch, 2 * h, 2 * w, 4 * c, device='cuda').to(BF16).requires_grad_()
        y = torch.randn(size.batch, 4 * h, 4 * w, 64, device='cuda').to(BF16).permute(0, 3, 1, 2)
        project = (0.1 * torch.randn(c, 64, device='cuda')).to(BF16).requires_grad_()
        norm = tuple(torch.rand(c, device='cuda') + 0.5 for _ in range(4))
        leaves = [x, y.requires_grad_(), project, size.map(1, FP32), _weight(c)]
        return leaves, lambda *leaves: [*leaves, norm]
    if op == 'sampling_points':  # of an extractor
        heads = (12 if c == 768 else 6, 1, 4)
        n = 21 * size.hw[0] * size.hw[1] // 4
        wide = 4 * heads[0]
        table = (torch.rand(n, 2, device='cuda'), torch.rand(1, 2, device='cuda'))
        both = torch.randn(size.batch, n, 3 * wide, device='cuda').to(BF16)
        leaves = [x.requires_grad_() for x in both.split([2 * wide, wide], -1)]
        return leaves, lambda *leaves: [*leaves, table, heads]
    if op == 'resized_sum':
        return [size.map(4), size.map(1, FP32), size.map(4), _weight(c)], lambda *leaves: [*leaves]
    return [size.tokens(16), _weight(c, 16), _weight(c)], lambda *leaves: [*leaves, FP32]


def _norm_arguments(running: tuple[Tensor, Tensor], x: Tensor, w: Tensor, b: Tensor) -> list:
    """Training where gradients are wanted, else inference; ReLU and pooling follow."""
    return [x, running, w, b, torch.is_grad_enabled(), 0.1, 1e-5, True, True]


def _as_before(op: str) -> Callable[..., Outputs]:
    """What the modules did with PyTorch's operators under autocast."""

    def gated_head_norm(
        x: Tensor, local: Tensor, gate: Tensor, wx: Tensor, wl: Tensor, bias: Tensor, silu: bool
    ) -> Tensor:
        share = (gate + bias.to(BF16)).sigmoid()
        x, local = (
            F.rms_norm(t.float().unflatten(-1, (-1, w.numel())), w.shape, w, 1e-6).flatten(-2)
            for t, w in ((x, wx), (local, wl))
        )
        return F.silu(share * x + (1 - share) * local).to(BF16)

    def depthwise_conv(x: Tensor, w: Tensor, shapes: list, bias: None, act: str) -> Tensor:
        maps = x.unflatten(1, shapes[0]).permute(0, 3, 1, 2)
        maps = F.silu(F.conv2d(maps, w.to(BF16), bias, padding=1, groups=w.shape[0]))
        return maps.flatten(2).transpose(1, 2)

    def log_gates(low: Tensor, w: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple:
        gates = F.logsigmoid(F.linear(low, w.to(BF16), bias.to(BF16)).float()) / 16
        return gates.chunk(2, -1)

    def swiglu(x: Tensor) -> Tensor:
        gate, x = x.chunk(2, -1)
        return F.silu(gate) * x

    def resized_sum(x: Tensor, tokens: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        x = x + bias.to(BF16)[:, None, None] + y
        tokens = F.interpolate(tokens, x.shape[2:], mode='bilinear', align_corners=False)
        return x + tokens.to(BF16)

    forms = (gated_head_norm, depthwise_conv, log_gates, swiglu, resized_sum)
    return {form.__name__: form for form in forms}.get(op, getattr(reference, op))


def traffic(case: str) -> tuple[int, int]:
    """Bytes that must be moved: leaves read and results written; twice that and gradients."""
    leaves, arguments = _draw(*CASES[case])
    with torch.no_grad():
        out = getattr(kernels, CASES[case][0])(*arguments(*leaves))
    outs = out if isinstance(out, tuple) else (out,)
    read, written = (sum(x.nbytes for x in xs) for xs in (leaves, outs))
    return read + written, 3 * read + 2 * written


def l2_traffic(case: str) -> None:
    """Not counted: nothing but the conv reads anything twice."""


def contenders(case: str) -> Iterator[Contender]:
    """Everything that is measured on a case."""
    op, size = CASES[case]
    leaves, arguments = _draw(op, size)

    def expect(*wide: Tensor) -> Outputs:
        args = arguments(*wide)
        return getattr(reference, op)(*[FP32 if x is BF16 else x for x in args])

    def errors(out: Outputs, grads: tuple[Tensor, ...], grad: Outputs) -> list[float]:
        wide = [x.detach().float().requires_grad_() for x in leaves]
        wanted = expect(*wide)
        outs, grad = (x if isinstance(x, tuple) else (x,) for x in (out, grad))
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        wanted_grads = torch.autograd.grad(wanted, wide, [g.float() for g in grad])
        pairs = zip((*outs, *grads), (*wanted, *wanted_grads), strict=True)
        return [((x.float() - y).norm() / y.norm()).item() for x, y in pairs]

    before = _as_before(op)
    torch._dynamo.reset()
    for name, function in (
        ('mmvig', getattr(kernels, op)),
        ('PyTorch', before),
        ('PyTorch, compiled', torch.compile(before, fullgraph=True, dynamic=False)),
    ):
        run = lambda *leaves, function=function: function(*arguments(*leaves))  # noqa: E731
        # PyTorch rounds before it takes maxima: gradients go to other pixels
        tolerance = 0.3 if op == 'batch_norm' and name != 'mmvig' else 3e-2
        yield Contender(name, run, leaves, errors, tolerance)
