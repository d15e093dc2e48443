"""Runs `gpu_forms.py` where there is no GPU, whose tests run the forms themselves."""

from pathlib import Path

import pytest
import torch

from tests.kernels.interpreter import run_interpreted


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_backbones_take_the_same_values_through_the_kernels() -> None:
    pytest.importorskip('triton')
    run_interpreted(Path(__file__).with_name('gpu_forms.py'))
