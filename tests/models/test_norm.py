"""Batch norm by a layer: when the layer itself has to run."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from mmvig.models.layers.conv import Conv2d, fold_norm
from mmvig.models.layers.norm import draw_keep, given_statistics, normalize_batch


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


def conv_and_norm(device: str = 'cpu') -> tuple[Conv2d, nn.BatchNorm2d]:
    conv = Conv2d(8, 16, 3, 2, padding=1, bias=False).to(device)
    norm = nn.BatchNorm2d(16).to(device)
    for param in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(param)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return conv, norm.eval()


@torch.no_grad()
def test_a_norm_folds_into_the_conv_before_it() -> None:
    conv, norm = conv_and_norm()
    x = torch.randn(2, 8, 9, 6)
    given = given_statistics(norm)
    weight, bias = fold_norm((torch.float32, norm.eps), conv.weight, None, *given)
    out = F.conv2d(x, weight, bias, stride=2, padding=1)
    torch.testing.assert_close(out, norm(conv(x)), rtol=1e-4, atol=1e-5)
    assert not conv.folds_norm(x) and not conv.folds_norm(x.half())  # no GPU


@torch.no_grad()
def test_what_is_kept_of_a_norm_follows_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no weight changes, as when statistics alone are computed anew."""
    monkeypatch.setattr(torch, 'cudnn_convolution_relu', lambda x, weight, bias, *_: bias.clone())
    conv, norm = conv_and_norm()
    x = torch.zeros(1)
    before = conv.with_norm(x, norm)
    assert torch.equal(conv.with_norm(x, norm), before)
    norm.train()(torch.randn(2, 16, 4, 4))
    assert not torch.equal(conv.with_norm(x, norm.eval()), before)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_conv_norm_and_relu_in_one_call(dtype: torch.dtype) -> None:
    conv, norm = conv_and_norm('cuda')
    x = torch.randn(2, 8, 9, 6, device='cuda').to(dtype, memory_format=torch.channels_last)
    assert conv.folds_norm(x) and not conv.folds_norm(x.float())
    for _ in range(2):  # what is kept of the statistics follows them
        expected = norm(F.conv2d(x.double(), conv.weight.double(), stride=2, padding=1).float())
        out = conv.with_norm(x, norm)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert (out.float() - expected.relu()).norm() < 1e-2 * expected.relu().norm()
        norm.running_mean.add_(0.5)


def test_drop_path_draws_for_each_branch() -> None:
    x, drop_path = torch.empty(4000, 2, 3), DropPath(0.25).train()
    branches = draw_keep(x, drop_path, branches=2)
    both = torch.stack(list(branches))
    torch.testing.assert_close(both.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert both.shape == (2, 4000)
    torch.testing.assert_close(
        (both == 0).float().mean(1), torch.full((2,), 0.25), rtol=0, atol=0.03
    )
    dropped_twice = (both == 0).all(0).float().mean().item()
    assert abs(dropped_twice - 0.25**2) < 0.02
    assert draw_keep(x, drop_path.eval(), branches=2) == [None, None]
