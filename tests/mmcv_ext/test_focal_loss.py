from collections.abc import Callable

import pytest
import torch
from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss

from . import reference
from .checks import DTYPES, check

LOSSES = [
    (sigmoid_focal_loss, reference.sigmoid_focal_loss),
    (softmax_focal_loss, reference.softmax_focal_loss),
]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma', [2.0, 0.5])
@pytest.mark.parametrize('ours, theirs', LOSSES)
def test_loss(
    ours: Callable, theirs: Callable, gamma: float, weighted: bool, dtype: torch.dtype, device: str
) -> None:
    target = torch.tensor([0, 2, 3, 1, 2, -1])  # 3 and -1 are background
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=dtype) if weighted else None

    def op(logits: torch.Tensor) -> torch.Tensor:
        factor = None if weight is None else weight.to(device)
        return ours(logits, target.to(device), gamma, 0.3, factor, 'sum')

    def formula(logits: torch.Tensor) -> torch.Tensor:
        factor = None if weight is None else weight.double()
        return theirs(logits, target, gamma, 0.3, factor).sum()

    # softmax runs in mmcv's own Python, in the input's precision
    half = {torch.float16: 1e-2, torch.bfloat16: 6e-2} if ours is softmax_focal_loss else {}
    check(op, formula, [torch.randn(6, 3) * 2], dtype, device, half.get(dtype))


@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_reductions(reduction: str) -> None:
    target = torch.tensor([0, 2, 3, 1])

    def op(logits: torch.Tensor) -> torch.Tensor:
        return sigmoid_focal_loss(logits, target, 2.0, 0.25, None, reduction)

    def formula(logits: torch.Tensor) -> torch.Tensor:
        loss = reference.sigmoid_focal_loss(logits, target, 2.0, 0.25, None)
        return loss.sum() / 4 if reduction == 'mean' else loss

    check(op, formula, [torch.randn(4, 3)], torch.float32, 'cpu')


@pytest.mark.parametrize('ours', [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_extreme_logits_stay_finite(ours: Callable, gamma: float) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 1e4]], requires_grad=True)
    loss = ours(logits, torch.tensor([0, 0, 1]), gamma, 0.25, None, 'sum')
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_no_rows() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = sigmoid_focal_loss(empty, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, 'sum')
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 3)
