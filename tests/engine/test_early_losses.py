"""Losses fetched early: the same values, on the host, before the backward pass is done."""

import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import RuntimeInfoHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner.priority import get_priority
from torch import Tensor, nn

from mmvig.engine import EarlyLossHook


class Slow(torch.autograd.Function):
    """The identity, whose gradient takes the GPU a quarter of a second."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        if grad.is_cuda:
            torch.cuda._sleep(500_000_000)
        return grad


class Model(BaseModel):
    """Two losses and a measure, of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, inputs: Tensor, mode: str = 'loss') -> dict[str, Tensor]:
        x = Slow.apply(self.weight) * inputs
        losses = [x.mean(), x.square().mean().half()]
        return dict(loss_a=x, loss_b=losses, accuracy=torch.tensor(7, device=x.device).double())


def train(hook: EarlyLossHook | None, device: str) -> tuple[Model, list[dict], list[float]]:
    """Three steps: the model, what each gives to be logged, the seconds until it was there."""
    model = Model().to(device)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    runner = SimpleNamespace(model=model)
    outputs, seconds = [], []
    if hook:
        hook.before_train(runner)
    for step in range(3):
        if device == 'cuda':
            torch.cuda.synchronize()
        start = time.perf_counter()
        logs = model.train_step(dict(inputs=torch.tensor([1.0 + step, 3.0])), wrapper)
        if hook:
            hook.after_train_iter(runner, step, outputs=logs)
        outputs.append({name: value.item() for name, value in logs.items()})
        seconds.append(time.perf_counter() - start)
        if hook:  # copies, not the model's own, one of which is float64
            kinds = {(value.device.type, value.dtype) for value in logs.values()}
            assert kinds == {('cpu', torch.float32)}
    if hook:
        hook.after_train(runner)
    return model, outputs, seconds


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_losses_and_steps_are_the_same(device: str) -> None:
    model, outputs, seconds = train(EarlyLossHook(), device)
    usual_model, usual, usual_seconds = train(None, device)
    assert torch.equal(model.weight, usual_model.weight)
    for got, wanted in zip(outputs, usual, strict=True):
        assert list(got) == ['loss', 'loss_a', 'loss_b', 'accuracy']
        assert got == pytest.approx(wanted, rel=1e-6)
    if device == 'cuda':
        assert max(seconds[1:]) < 0.1 < 0.2 < min(usual_seconds[1:])


def test_the_model_has_its_own_method_again() -> None:
    model, _, _ = train(EarlyLossHook(), 'cpu')
    assert 'parse_losses' not in vars(model)


def test_two_of_them() -> None:
    model, hooks = Model(), [EarlyLossHook(), EarlyLossHook()]
    runner = SimpleNamespace(model=model)
    for hook in hooks:
        hook.before_train(runner)
    loss, logs = model.parse_losses(dict(loss=torch.ones(2)))
    for hook in hooks:
        hook.after_train_iter(runner, 0, outputs=logs)
    assert loss.item() == logs['loss'].item() == 1
    for hook in hooks:
        hook.after_train(runner)
    assert 'parse_losses' not in vars(model)


def test_it_runs_before_the_losses_are_read() -> None:
    assert get_priority(EarlyLossHook.priority) < get_priority(RuntimeInfoHook.priority)


def test_steps_without_losses() -> None:
    EarlyLossHook().after_train_iter(SimpleNamespace(), 0, outputs=None)
    EarlyLossHook().after_train_iter(SimpleNamespace(), 0, outputs={})
