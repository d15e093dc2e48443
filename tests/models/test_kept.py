"""What inference keeps of the weights: until they change, in place, and for CUDA graphs."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from mmvig.models.layers import kept
from mmvig.models.layers.kept import Kept, cast, recording

BF16 = torch.bfloat16


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 4))


def test_kept_until_a_weight_changes(weight: nn.Parameter) -> None:
    keeper = Kept(cast)
    with torch.no_grad():
        (first,) = keeper(BF16, weight)
        assert keeper(BF16, weight)[0] is first
        weight.add_(1)
        (again,) = keeper(BF16, weight)
        assert again is first  # in place, for whoever reads it
        assert torch.equal(again, weight.to(BF16))
        assert keeper(torch.float16, weight)[0].dtype == torch.float16
    with torch.inference_mode():
        assert keeper(BF16, weight)[0] is first


def test_training_keeps_nothing(weight: nn.Parameter) -> None:
    keeper = Kept(cast)
    assert keeper(BF16, weight)[0] is not keeper(BF16, weight)[0]
    keeper = Kept(lambda dtype, x: (2 * x,))
    assert keeper(BF16, weight)[0].requires_grad


def test_oldest_settings_go(weight: nn.Parameter) -> None:
    calls = []

    def make(factor: int, x: Tensor) -> tuple[Tensor]:
        calls.append(factor)
        return (factor * x,)

    keeper = Kept(make, max_settings=2)
    with torch.no_grad():
        for factor in (1, 2, 1, 3, 1, 2):
            torch.testing.assert_close(keeper(factor, weight)[0], factor * weight)
    assert calls == [1, 2, 3, 2]


def test_a_parameter_itself_may_be_kept(weight: nn.Parameter) -> None:
    keeper = Kept(lambda dtype, x: (x.to(dtype),))
    with torch.no_grad():
        for _ in range(3):
            weight.mul_(2)
            version = weight._version
            assert keeper(torch.float32, weight)[0].data_ptr() == weight.data_ptr()
            assert weight._version == version


def test_copies_and_files_hold_nothing(weight: nn.Parameter) -> None:
    keeper = Kept(cast)
    with torch.no_grad():
        (first,) = keeper(BF16, weight)
        for other in (copy.deepcopy(keeper), pickle.loads(pickle.dumps(keeper))):
            (second,) = other(BF16, weight)
            assert second is not first
            assert torch.equal(second, first)


def test_graphs_read_what_is_kept_where_it_will_be_refreshed(
    weight: nn.Parameter, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Kept(cast)
    with torch.no_grad():
        (first,) = keeper(BF16, weight)
        monkeypatch.setattr(kept, 'is_capturing', lambda device: True)
        assert keeper(BF16, weight)[0] is not first
        with recording() as read:
            assert keeper(BF16, weight)[0] is first
        assert len(read) == 1
        weight.add_(1)
        with recording() as too_late:
            assert keeper(BF16, weight)[0] is not first
        assert not too_late
        read[0].refresh()
        assert torch.equal(first, weight.to(BF16))
