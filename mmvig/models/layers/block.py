"""Whether a ViG block can take its fused form, and its weights for that."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmvig.kernels.dispatch import form, working_dtype
from mmvig.models.layers.hooks import has_hooks
from mmvig.models.layers.kept import Kept
from mmvig.models.layers.linear import Linear, Product, cast_ahead
from mmvig.models.layers.mixer import BiGLAMixer
from mmvig.models.layers.norm import LayerNorm, RMSNorm

KINDS = (BiGLAMixer, nn.Conv2d, Linear, RMSNorm, LayerNorm, nn.RMSNorm)


def read_weights(block: nn.Module) -> list[Tensor | None] | None:
    """The parameters in the order of `fused_block.Weights`.

    None for a block that someone has changed: with hooks, other kinds of layers, or weights that
    are computed. Its modules have to run.
    """
    parts = block._modules
    attn, mlp = parts['attn'], parts['mlp']
    if type(attn) is not BiGLAMixer:
        return None
    inner = attn._modules
    conv, low_rank = inner['in_proj']._modules['0'], inner['gk_proj']._modules
    layers = (
        parts['attn_norm'], conv, inner['qkv_proj'], inner['g_proj'], low_rank['0'],
        low_rank['1'], inner['g_norm'], inner['l_norm'], inner['o_proj'], parts['mlp_norm'],
        mlp._modules['gate_proj'], mlp._modules['down_proj'],
    )  # fmt: skip
    for module in (attn, mlp, *layers):
        if has_hooks(module):
            return None
    if any(type(layer) not in KINDS for layer in layers):
        return None
    own = [layer._parameters for layer in layers]
    return [
        own[0]['weight'], own[0].get('bias'), own[1]['weight'], own[2]['weight'],
        own[3]['weight'], own[3]['bias'], own[4]['weight'], own[5]['weight'], own[5]['bias'],
        own[6]['weight'], own[7]['weight'], own[8]['weight'], own[9]['weight'],
        own[9].get('bias'), own[10]['weight'], own[11]['weight'],
    ]  # fmt: skip


class FusedForm:
    """Calls `fused_block.run` for a block; in inference it keeps the weights that are cast.

    No module: holds no state that belongs into a checkpoint.
    """

    def __init__(self) -> None:
        self._kept = Kept(_cast)

    def __call__(
        self,
        block: nn.Module,
        x: Tensor,
        y: Tensor | None,
        keep: Tensor | None,
        drop: Tensor | None,
        hw: tuple[int, int],
    ) -> tuple[Tensor, Tensor] | None:
        """What `fused_block.run` returns; None where the block's modules have to run.

        They have to without a GPU, under `torch.compile`, and where `read_weights` says so.
        """
        if form(x) != 'eager' or (weights := read_weights(block)) is None:
            return None
        # Imported here since PyTorch builds for the CPU come without Triton.
        from mmvig.models.layers import fused_block

        weights = fused_block.Weights(*weights)
        attn = block._modules['attn']
        settings = fused_block.Settings(
            hw,
            attn.num_heads,
            'silu' if attn.conv_act else 'none',
            attn.out_act,
            (block.attn_norm.eps, block.mlp_norm.eps, attn.g_norm.eps),
            working_dtype(x),
        )
        ahead = self._kept.ahead
        cast = None if ahead is None else fused_block.Cast(*ahead)
        if not torch.is_grad_enabled():
            cast = self._kept(settings.dtype, *fused_block.products(weights))
        y = None if y is None else y.contiguous()
        return fused_block.run(x.contiguous(), y, keep, drop, weights, cast, settings)

    def product(self, block: nn.Module) -> Product | None:
        """For `cast_ahead`, in the order of `fused_block.Cast`; None as for a call."""
        weights = read_weights(block)
        if weights is None:
            return None
        from mmvig.models.layers import fused_block

        *into, out, up, down = fused_block.products(fused_block.Weights(*weights))
        return self._kept, into, [out], [up], [down]

    def __deepcopy__(self, memo: dict) -> 'FusedForm':
        """A copy of the model starts with nothing kept."""
        return FusedForm()


def cast_blocks_ahead(
    forms: Sequence[tuple[nn.Module, FusedForm]], x: Tensor
) -> AbstractContextManager[None]:
    """In training on a GPU: casts the weights of several blocks by one call, for a pass inside."""
    if form(x) != 'eager' or not torch.is_grad_enabled():
        return nullcontext()
    products = [product for block, fused in forms if (product := fused.product(block)) is not None]
    return cast_ahead(products, working_dtype(x)) if products else nullcontext()


def _cast(dtype: torch.dtype, *products: Tensor) -> tuple[Tensor, ...]:
    """`fused_block.cast`, imported when it is called, as Triton is."""
    from mmvig.models.layers import fused_block

    return fused_block.cast(dtype, *products)
