"""Whether a module's call is looked at: then it has to be made, and no kernel may stand in."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of the module's own want to see its forward or backward pass."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
