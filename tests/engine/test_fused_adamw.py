"""AdamW with kept lists: torch's bits, whatever happens between steps."""

import copy

import pytest
import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from mmvig.engine import FusedAdamW, fused_adamw

SETTINGS = dict(betas=(0.8, 0.95), eps=1e-6)


class Pair:
    """A model twice, ours trained by `FusedAdamW` and torch's by its own."""

    def __init__(self, device: str = 'cpu') -> None:
        torch.manual_seed(0)
        self.ours = nn.ModuleList(nn.Linear(3, 5) for _ in range(4)).to(device)
        self.theirs = copy.deepcopy(self.ours)
        self.optimizers = [
            FusedAdamW(self.groups(self.ours), lr=0.1, **SETTINGS),
            torch.optim.AdamW(self.groups(self.theirs), lr=0.1, fused=True, **SETTINGS),
        ]

    @staticmethod
    def groups(model: nn.ModuleList) -> list[dict]:
        """Three groups of other rates and decays; the last layer is in none."""
        return [
            dict(params=list(model[i].parameters()), lr=0.1 / (i + 1), weight_decay=0.3 * i)
            for i in range(3)
        ]

    def step(self, without: tuple[int, ...] = ()) -> None:
        """A step of both with the same gradients, of all layers but some; compares them."""
        device = next(self.ours.parameters()).device
        for i, (a, b) in enumerate(zip(self.ours, self.theirs, strict=True)):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                p.grad = None if i in without else torch.randn(p.shape, device=device)
                q.grad = p.grad
        for optimizer in self.optimizers:
            optimizer.step()
        for p, q in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Notes calls of torch's step by ours."""
    calls, step = [], fused_adamw._USUAL_STEP

    def noted(self: FusedAdamW, closure: object) -> Tensor | None:
        calls.append(None)
        return step(self, closure)

    monkeypatch.setattr(fused_adamw, '_USUAL_STEP', noted)
    return calls


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_steps_are_those_of_torch(device: str, usual: list[None]) -> None:
    pair = Pair(device)
    for _ in range(5):
        pair.step()
    assert len(usual) == 1  # the first, which makes the states


def test_rates_that_a_scheduler_changes(usual: list[None]) -> None:
    pair = Pair()
    for factor in (1.0, 0.5, 0.1):
        for optimizer in pair.optimizers:
            for group in optimizer.param_groups:
                group['lr'] *= factor
        pair.step()
    assert len(usual) == 1


def test_layers_without_a_gradient_for_some_steps(usual: list[None]) -> None:
    """At first, later on, and again; layer 1 alone has a state of fewer steps."""
    pair = Pair()
    for without in ((1,), (1,), (), (), (0,), ()):
        pair.step(without)
    assert len(usual) == 3  # the first, that in which layer 1 comes, that in which layer 0 lacks


def test_states_that_are_loaded(usual: list[None]) -> None:
    pair = Pair()
    pair.step()
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers]
    pair.step()
    for optimizer, state in zip(pair.optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    pair.step()
    ours, theirs = pair.optimizers
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # and torch's
    pair.step()
    assert len(usual) == 1


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_states_of_an_adamw_that_was_not_fused(device: str, usual: list[None]) -> None:
    pair = Pair(device)
    ours, theirs = pair.optimizers
    plain = torch.optim.AdamW(Pair.groups(pair.theirs), lr=0.1, foreach=True, **SETTINGS)
    for p in pair.theirs.parameters():
        p.grad = torch.randn(p.shape, device=device)
    plain.step()
    pair.ours.load_state_dict(pair.theirs.state_dict())
    state = copy.deepcopy(plain.state_dict())
    ours.load_state_dict(state)
    assert state['param_groups'][0]['fused'] is not True  # theirs stays as it was
    fused = [{**group, 'fused': True, 'foreach': None} for group in state['param_groups']]
    theirs.load_state_dict(copy.deepcopy({**state, 'param_groups': fused}))
    for _ in range(2):
        pair.step()
    assert not usual
    scaler = torch.amp.GradScaler(device)
    loss = sum(layer(torch.ones(3, device=device)).sum() for layer in pair.ours[:3])
    scaler.scale(loss).backward()
    scaler.step(ours)
    assert len(usual) == 1  # torch's step heeds the scale


def test_settings_that_are_not_its_own() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([weight], fused=True)
    with pytest.raises(ValueError, match='got fused=False: use AdamW'):
        FusedAdamW([weight], fused=False)
    other = torch.optim.AdamW([weight], amsgrad=True)
    with pytest.raises(ValueError, match='amsgrad=True: use AdamW'):
        optimizer.load_state_dict(other.state_dict())


def test_a_group_that_is_added(usual: list[None]) -> None:
    pair = Pair()
    pair.step()
    pair.step()
    for optimizer, model in zip(pair.optimizers, (pair.ours, pair.theirs), strict=True):
        optimizer.add_param_group(dict(params=list(model[3].parameters()), lr=0.3))
    pair.step()
    pair.step()
    assert len(usual) == 2


def test_kinds_that_torch_alone_has(usual: list[None]) -> None:
    pair = Pair()
    for optimizer in pair.optimizers:
        optimizer.param_groups[1]['maximize'] = True
    for _ in range(2):
        pair.step()
    assert len(usual) == 2


def test_a_closure(usual: list[None]) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([weight])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(2)]
    assert losses[1] < losses[0] == 3
    assert len(usual) == 2


def test_hooks_run_once_in_every_step() -> None:
    pair, calls = Pair(), []
    pair.optimizers[0].register_step_pre_hook(lambda *args: calls.append(None))
    for _ in range(3):
        pair.step()
    assert len(calls) == 3


def test_a_gradient_scaler_is_heeded(usual: list[None]) -> None:
    pair = Pair()
    pair.step()
    optimizer = pair.optimizers[0]
    before = [p.clone() for p in pair.ours.parameters()]
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    assert len(usual) == 2
    assert all(torch.equal(p, q) for p, q in zip(pair.ours.parameters(), before, strict=True))


def test_configs_find_it_by_name() -> None:
    assert OPTIMIZERS.get('FusedAdamW') is FusedAdamW
