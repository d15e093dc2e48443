"""Small shapes data sets, drawn once a session."""

from dataclasses import asdict
from pathlib import Path

import pytest

from mmvig.datasets import ShapesSpec, ensure_shapes

SPEC = ShapesSpec(num_train=5, num_val=4, height=96, width=128, seed=3)


@pytest.fixture(scope='session')
def spec() -> ShapesSpec:
    return SPEC


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete small data set; tests do not change it."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    ensure_shapes(root, SPEC)
    return root


@pytest.fixture(scope='session')
def shapes_kwargs(shapes_root: Path) -> dict:
    """Arguments of a shapes dataset class that reads `shapes_root`."""
    return {'data_root': str(shapes_root), 'shapes': asdict(SPEC)}
