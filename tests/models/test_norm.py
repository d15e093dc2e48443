"""Batch norm by a layer: when the layer itself has to run."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmvig.models.layers.norm import normalize_batch


class Noted(nn.SyncBatchNorm):
    """Notes its calls, and returns its input."""

    def __init__(self) -> None:
        super().__init__(2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize(('processes', 'calls'), [(1, 0), (2, 1)])
def test_statistics_over_processes_are_the_layers_own(
    processes: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: processes)
    norm, x = Noted(), torch.randn(3, 2, 4, 4)
    normalize_batch(norm, x)
    assert norm.calls == calls
    norm.eval()
    normalize_batch(norm, x)  # given statistics are the same everywhere
    assert norm.calls == calls


def test_hooks_see_the_layer() -> None:
    norm, seen = nn.BatchNorm2d(2), []
    norm.register_forward_hook(lambda *args: seen.append('forward'))
    out = normalize_batch(norm, torch.randn(3, 2, 4, 4), relu=True)
    assert seen == ['forward']
    assert (out >= 0).all()
