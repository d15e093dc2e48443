"""Skips GPU tests without a GPU, keeps CPU tests deterministic, and begins with what takes long."""

import pytest
import torch

# files that take minutes: one that comes last would keep one process at work, the others idle
LONG = ('test_train_and_test', 'test_bigla', 'test_compile', 'test_block', 'test_gpu_forms')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if torch.cuda.is_available():
        return
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
