"""Where a model has its backbone, and how that one is compiled."""

import torch
from mmengine.model import is_model_wrapper
from torch import nn
from torch.torch_version import TorchVersion

MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper, or itself."""
    return model.module if is_model_wrapper(model) else model


def find_backbone(model: nn.Module) -> nn.Module:
    """The backbone of a detector or segmentor, in a distributed wrapper or not.

    Raises:
        ValueError: If the model has none.
    """
    model = unwrap(model)
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f'{type(model).__name__} has no backbone')
    return backbone


def compile_backbone(
    backbone: nn.Module,
    mode: str = 'default',
    dynamic: bool | None = None,
    backend: str = 'inductor',
) -> None:
    """Has a backbone run as one compiled graph from its next call on; its weights' names stay.

    Copies of the backbone, such as those for averaged weights, are not compiled.

    Args:
        backbone: One of ours, or another that `torch.compile` takes as a whole.
        mode: torch.compile's. 'reduce-overhead' also records CUDA graphs, of the backward pass,
            too, one for each size: for inputs of one or few sizes.
        dynamic: Whether sizes are left open; None compiles for the first size, and from the second
            one on for any.
        backend: torch.compile's; mode is for 'inductor' alone.

    Raises:
        ValueError: For an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f'mode must be one of {", ".join(MODES)}, got {mode!r}')
    if backend == 'inductor':
        _leave_out_operands()
    mode = None if mode == 'default' else mode
    backbone.compile(fullgraph=True, dynamic=dynamic, mode=mode, backend=backend)


def _leave_out_operands() -> None:
    """Has Inductor name an operator that it leaves as it is without its operands.

    PyTorch 2.11 writes them out for its log, asked for or not, with everything they are made of,
    as often as it occurs there: for a backbone with an adapter that takes longer than compiling
    it, and did not end in minutes. 2.14 does not; those between were not looked at.
    """
    if TorchVersion(torch.__version__) < '2.14':
        from torch._inductor.exc import OperatorIssue  # takes seconds

        OperatorIssue.operator_str = staticmethod(lambda target, args, kwargs: f'{target}')
