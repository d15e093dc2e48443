"""Multiply-adds of a model, as the paper counts them and in full, by part.

1 FLOP of the paper (arXiv 2405.18425) and of this module is one multiply-add.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from mmvig.analysis.shape_run import ShapeRun
from mmvig.analysis.whole_models import run_model
from mmvig.models.backbones.vit import TimmViT
from mmvig.models.layers.ffn import SwiGLU

# Interpolating between four pixels, and the attention weight (arXiv 2010.04159, appendix A.1).
MACS_PER_SAMPLE = 5
BEHIND_BACKBONE = ('neck', 'heads')
# Where a module belongs, by its name; the first match counts.
PARTS = (
    (r'\.spm\b', 'adapter: spatial prior'),
    (r'\.injector\b', 'adapter: injectors'),
    (r'\.(extractor|extra_extractors)\b', 'adapter: extractors'),
    (r'^backbone\b.*\.patch_embed\b', 'patch embedding'),
    (r'^backbone\b.*\bblocks\.\d+\.attn\b', 'mixers'),
    (r'^backbone\b.*\bblocks\.\d+\.mlp\b', 'FFNs'),
    (r'^backbone\b', 'rest of the backbone'),
    (r'^neck\b', 'neck'),
    (r'', 'heads'),
)


@dataclass
class Cost:
    """What a model costs for one image.

    Attributes:
        paper: Multiply-adds by part as the paper's counter counts: convolutions and transposed
            ones with bias, linears and attention without, 2 a value for LayerNorm, 1 for ReLU and
            max pooling. Not counted: the second linear of SwiGLU, the recurrence, the sampling of
            deformable attention, and the zeros that fill up attention windows.
        everything: Multiply-adds by part with those.
        params: Parameters by part of the model: backbone, neck and each head.
        uncounted: Operators outside PyTorch's own that ran and have no formula.
    """

    paper: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    everything: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    params: dict[str, int] = field(default_factory=dict)
    uncounted: set[str] = field(default_factory=set)

    def total(self, column: str, backbone_only: bool = False) -> int:
        """Sum of 'paper' or 'everything' over all parts, or over those of the backbone."""
        counts = getattr(self, column).items()
        return sum(n for part, n in counts if not (backbone_only and part in BEHIND_BACKBONE))


def count_backbone(backbone: nn.Module, height: int, width: int) -> Cost:
    """Cost of a backbone for one image of height x width pixels, three channels."""
    model = nn.Module()
    model.backbone = backbone
    counter = FlopCounter(model, height, width)
    with counter:
        counter.model.backbone(counter.blank(1, 3, height, width))
    return counter.cost


def count_model(model: nn.Module, height: int, width: int) -> Cost:
    """Cost of a detector of mmdet or segmentor of mmseg in inference, without post-processing.

    Auxiliary heads of segmentors serve training alone and cost nothing. The second stage of a
    two-stage detector sees as many boxes as the test settings allow; see `whole_models`.

    Args:
        model: The detector or segmentor.
        height, width: Of the image that the backbone gets, in pixels, padding included.

    Raises:
        ValueError: For a model of another kind.
    """
    counter = FlopCounter(model, height, width)
    with counter:
        run_model(counter.model, counter.blank, height, width)
    return counter.cost


class FlopCounter(ShapeRun):
    """Counts what a copy of a model, `self.model`, runs while active; the result is `self.cost`.

    Args:
        model: A model whose backbone is called `backbone`.
        height, width: Of the image, in pixels.
    """

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.cost = Cost()
        for name, child in model.named_children():
            if count := sum(p.numel() for p in child.parameters()):
                self.cost.params[name] = count
        self.model = self.copy_of(model)
        self._scopes = ['']
        self._share_in_paper = _shares_in_paper(self.model, height, width)
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._scopes.append(name))
            module.register_forward_hook(self._leave)

    def _leave(self, *_: Any) -> None:
        self._scopes.pop()

    def observe(self, op: Any, args: tuple, out: Any) -> None:
        """Adds the cost of one operator to its part."""
        name = op._schema.name
        if name in FORMULAS:
            macs = FORMULAS[name](args, out)
        elif op.overloadpacket in flop_registry:
            macs = flop_registry[op.overloadpacket](*args, out_val=out) // 2
        else:
            if not name.startswith('aten::'):
                self.cost.uncounted.add(name)
            return
        scope = self._scopes[-1]
        part = next(part for pattern, part in PARTS if re.search(pattern, scope))
        if name not in UNSEEN:
            self.cost.paper[part] += round(macs * self._share_in_paper.get(scope, 1))
        elif part not in BEHIND_BACKBONE:
            part = UNSEEN[name]
        self.cost.everything[part] += macs


def _shares_in_paper(model: nn.Module, height: int, width: int) -> dict[str, float]:
    """What share of a module's multiply-adds the paper counts, where it is not all of them."""
    shares = {}
    for name, module in model.named_modules():
        if isinstance(module, SwiGLU):
            shares[f'{name}.down_proj'] = 0.0
        elif isinstance(module, TimmViT) and (size := module.window_size):
            h, w = ceil(height / module.patch_size), ceil(width / module.patch_size)
            share = h * w / (ceil(h / size) * ceil(w / size) * size**2)
            for i, block in enumerate(module.blocks):
                if (i + 1) % module.global_every:
                    scopes = [f'{name}.blocks.{i}.attn.{n}' for n, _ in block.attn.named_modules()]
                    shares |= dict.fromkeys([s.rstrip('.') for s in scopes], share)
    return shares


def _conv(args: tuple, out: Tensor) -> int:
    x, weight, bias, transposed = args[0], args[1], args[2], args[6]
    pixels = x.numel() if transposed else out.numel()
    return pixels * weight[0].numel() + (0 if bias is None else out.numel())


def _depthwise_conv(args: tuple, out: Tensor) -> int:
    weight, bias = args[1], args[2]
    return out.numel() * (weight[0].numel() + (bias is not None))


def _residual_norm(args: tuple, out: tuple[Tensor, Tensor]) -> int:
    """LayerNorm, which has a bias, as `native_layer_norm`; RMSNorm like PyTorch's own, nothing."""
    return 0 if args[3] is None else 2 * args[0].numel()


def _recurrence(args: tuple, out: Tensor) -> int:
    """`k^T v` and `q S` of every token, in two directions."""
    q, _, v, *_ = args
    return 4 * q.numel() * v.shape[-1]


def _deform_attn(args: tuple, out: Tensor) -> int:
    value, *_, weights = args
    return MACS_PER_SAMPLE * weights.numel() * value.shape[-1]


# Multiply-adds from arguments and result, by the operator's name, beside the products that
# torch.utils.flop_counter has formulas for.
FORMULAS = {
    'aten::convolution': _conv,
    'aten::native_layer_norm': lambda args, out: 2 * args[0].numel(),
    'aten::relu': lambda args, out: args[0].numel(),
    'aten::relu_': lambda args, out: args[0].numel(),
    'aten::max_pool2d_with_indices': lambda args, out: args[0].numel(),
    # mm's models call it for nothing but deformable attention
    'aten::grid_sampler_2d': lambda args, out: MACS_PER_SAMPLE * out.numel(),
    'mmvig::bidirectional_gla': _recurrence,
    'mmvig::depthwise_conv': _depthwise_conv,
    'mmvig::gated_head_norm': lambda args, out: 0,
    'mmvig::log_gates': lambda args, out: args[0].numel() * args[1].shape[0],
    'mmvig::ms_deform_attn': _deform_attn,
    'mmvig::residual_norm': _residual_norm,
    'mmvig::resized_sum': lambda args, out: 0,
    'mmvig::swiglu': lambda args, out: 0,
}
# Operators that the paper's counter does not see, and the part of the backbone they are listed as.
UNSEEN = {
    'aten::grid_sampler_2d': 'deformable sampling',
    'mmvig::bidirectional_gla': 'recurrence',
    'mmvig::ms_deform_attn': 'deformable sampling',
}
