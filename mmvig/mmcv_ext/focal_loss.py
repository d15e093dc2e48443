"""Focal losses (arXiv 1708.02002, equation 5) and their gradients, element by element."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.mmcv_ext.numeric import store, wide

_TINY = torch.finfo(torch.float32).tiny


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """`-a (1 - p)^gamma log p` of every class, p being the probability of the right answer.

    Args:
        input: (N, C), logits.
        target: (N,), int64; any value outside [0, C) means background.
        weight: (C,), factor of the rows of that class, or empty; background keeps factor 1.
        output: (N, C), written.
        gamma: Focus.
        alpha: `a` of the target class; `1 - alpha` is that of all others.
    """
    x, is_target = _signed_logits(input, target)
    loss = -torch.sigmoid(-x).pow(gamma) * F.logsigmoid(x)
    loss = torch.where(is_target, alpha * loss, (1 - alpha) * loss)
    store(output, _weigh_rows(loss, target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of the loss by the logits; arguments as in the forward, `grad_input` written."""
    x, is_target = _signed_logits(input, target)
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    # d/dx [(1 - p)^gamma log p] = (1 - p)^gamma (1 - p - gamma p log p)
    slope = q.pow(gamma) * (q - gamma * p * F.logsigmoid(x))
    slope = torch.where(is_target, -alpha * slope, (1 - alpha) * slope)
    store(grad_input, _weigh_rows(slope, target, weight))


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """`-alpha (1 - p)^gamma log p`, p being the target's probability.

    Args:
        input: (N, C), probabilities: mmcv takes the softmax before.
        target: (N,), int64; a row whose target lies outside [0, C) counts nothing.
        weight: (C,), factor of the rows of that class, or empty.
        output: (N,), written.
        gamma: Focus.
        alpha: Factor of the loss.
    """
    p, valid = _target_probability(input, target)
    loss = -alpha * (1 - p).pow(gamma) * p.log()
    store(output, _weigh_rows(torch.where(valid, loss, 0), target, weight))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Derivative by the logits; arguments as in the forward.

    `buff` (N,) is written with p times the loss's derivative by p, `grad_input` (N, C) with that
    times `[c is target] - p_c`, the softmax's share.
    """
    p, valid = _target_probability(input, target)
    q = 1 - p
    # The floor keeps 0 * inf away where p is 1 and gamma is less than 1; log p is 0 there.
    slope = alpha * (gamma * q.clamp(min=_TINY).pow(gamma - 1) * p * p.log() - q.pow(gamma))
    slope = _weigh_rows(torch.where(valid, slope, 0), target, weight)
    buff.copy_(slope)
    one_hot = target[:, None] == torch.arange(input.shape[1], device=input.device)
    store(grad_input, slope[:, None] * (one_hot.to(slope.dtype) - wide(input)[0]))


def _signed_logits(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of being right, (N, C), and where the class is the target, (N, C) bool."""
    (logits,) = wide(input)
    is_target = target[:, None] == torch.arange(input.shape[1], device=input.device)
    return torch.where(is_target, logits, -logits), is_target


def _target_probability(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of each row's target, floored at the smallest normal number, and its validity."""
    (probabilities,) = wide(probabilities)
    classes = probabilities.shape[1]
    valid = (target >= 0) & (target < classes)
    picked = probabilities.gather(1, target.clamp(0, classes - 1)[:, None])[:, 0]
    return picked.clamp(min=_TINY), valid


def _weigh_rows(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Multiplies the rows of each class by its weight; an empty weight changes nothing."""
    if weight.numel() == 0:
        return values
    valid = (target >= 0) & (target < weight.numel())
    rows = torch.where(valid, wide(weight)[0][target.clamp(0, weight.numel() - 1)], 1)
    return values * rows.view(-1, *[1] * (values.dim() - 1))
