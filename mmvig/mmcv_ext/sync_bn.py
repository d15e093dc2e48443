"""The local parts of mmcv's synchronised batch normalisation (`MMSyncBN`).

mmcv itself sums the statistics over the processes between these steps. Shape legend: B images,
C channels, N pixels of an image.
"""

from torch import Tensor


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Writes the mean (C,) of `input` (B, C, N)."""
    mean.copy_(input.to(mean.dtype).mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Writes the mean squared distance (C,) of `input` (B, C, N) from `mean` (C,)."""
    var.copy_((input.to(var.dtype) - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Normalises, and moves the running statistics.

    Args:
        input: (B, C, N).
        mean, var: (C,), float32, over all processes.
        weight, bias: (C,), or None.
        running_mean, running_var: (C,), updated, or None; the variance without bias.
        norm: (B, C, N), float32, written with the normalised input.
        std: (C,), float32, written.
        output: (B, C, N), written.
        eps: Added to the variance.
        momentum: Share of the new statistics; a tensor stays on its device.
        group_size: Processes.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input.to(norm.dtype) - mean[:, None]) / std[:, None])
    output.copy_(norm if weight is None else norm * weight[:, None] + bias[:, None])
    if running_mean is None:
        return
    count = input.shape[0] * input.shape[2] * group_size
    unbiased = var * (count / (count - 1)) if count > 1 else var
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(running + momentum * (new - running))


def sync_bn_backward_param(
    grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> None:
    """Writes the gradients (C,) of weight and bias from those of the output (B, C, N)."""
    grads = grad_output.to(norm.dtype)
    grad_weight.copy_((grads * norm).sum((0, 2)))
    grad_bias.copy_(grads.sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Writes the gradient of the input (B, C, N).

    `grad_weight` and `grad_bias` (C,) come averaged over the processes; the rest as in the forward.
    """
    factor = norm.shape[0] * norm.shape[2]
    through_statistics = (grad_weight[:, None] * norm + grad_bias[:, None]) / factor
    grads = grad_output.to(norm.dtype) - through_statistics
    grad_input.copy_(grads * (weight / std)[:, None])
