"""Reference outputs of the official networks, where they are at hand beside the checkout."""

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'shared' / 'parity'

needs_parity = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f'no reference outputs of the official networks at {FOLDER}'
)


def keys(name: str) -> dict[str, list[int]]:
    """Names and shapes of an official state dict, such as 'vig_tiny'."""
    return json.loads((FOLDER / f'{name}_keys.json').read_text())


def seeded():
    """The module that makes weights and images from names."""
    spec = importlib.util.spec_from_file_location('seeded', FOLDER / 'seeded.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
