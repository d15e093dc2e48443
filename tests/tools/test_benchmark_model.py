"""tools/benchmark_model.py: checks come before times, failures are told, reports are written."""

import json
import math
from pathlib import Path

import pytest
from torch import Tensor, nn

from tests.tools.conftest import TOOLS, run_tool


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


class Tiny(nn.Module):
    """A conv, times `spoil`."""

    def __init__(self, spoil: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.spoil = spoil

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if x.shape[2] > 64:
            raise AssertionError('too large\nsecond line')
        return (self.conv(x) * self.spoil,)


def measure(build, step: str = 'forward', size: int = 16):
    from benchmarks.network_figures import measure
    from benchmarks.network_forms import Case
    from benchmarks.networks import Network

    case = Case(size, size, 2, step, 'eager', 'float32')
    return measure(Network('tiny', build), case, 'cpu')


@pytest.mark.parametrize('step', ['forward', 'training'])
def test_a_network_that_is_right_is_timed(step: str) -> None:
    figures = measure(Tiny, step)
    assert figures.note == ''
    assert figures.ms > 0
    assert figures.error == 0
    assert (figures.gradient_error == 0) == (step == 'training')
    row = figures.as_dict()
    assert row['images_per_second'] == pytest.approx(2e3 / row['ms'])
    assert row['ms_per_megapixel'] == pytest.approx(1e6 * row['ms'] / 512)


def test_wrong_outputs_are_found_and_not_timed() -> None:
    built = []

    def build() -> Tiny:
        built.append(1)
        return Tiny(spoil=1.0 if len(built) == 1 else 1.5)  # the first is the reference

    figures = measure(build)
    assert figures.note == 'wrong: error 5.0e-01 of an output'
    assert math.isnan(figures.ms)
    assert measure(lambda: Tiny(spoil=math.nan)).note == 'wrong: not finite'


def test_a_network_that_does_not_run_says_why_in_one_line() -> None:
    figures = measure(Tiny, size=128)
    assert figures.note == 'AssertionError: too large'
    assert figures.as_dict()['ms'] is None


def test_reports(tmp_path: Path) -> None:
    from benchmarks import network_report as report

    rows = [measure(Tiny, size=size) for size in (16, 32)]
    assert report.line(rows[0]).startswith('tiny')
    lines = report.markdown(rows).splitlines()
    assert lines[0] == '| forward, batch 2, ms | 16x16 eager | 32x32 eager |'
    assert lines[2].startswith('| tiny | ')
    report.plot(rows, {('tiny', 16, 16): 1.0, ('tiny', 32, 32): 4.0}, str(tmp_path / 'figure.svg'))
    assert (tmp_path / 'figure.svg').stat().st_size > 1000


def test_names_and_config_files(tmp_path: Path) -> None:
    config = TOOLS.parent / 'configs' / 'segmentation' / 'vig_t_linear.py'
    run_tool(
        *('benchmark_model.py', config, '--shapes', '32x48', '--device', 'cpu'),
        *('--json', 'figures.json', '--markdown', 'table.md'),
        cwd=tmp_path,
    )
    (row,) = json.loads((tmp_path / 'figures.json').read_text())['rows']
    assert (row['height'], row['width'], row['note'], row['error']) == (32, 48, '', 0)
    assert row['ms'] > 0
    assert '32x48 eager' in (tmp_path / 'table.md').read_text()


def test_mistakes_get_one_line(fail) -> None:
    assert 'vig-x is no config file, and none of vig-t-adapter' in fail(
        'benchmark_model.py', 'vig-x'
    )
    assert 'got 64' in fail('benchmark_model.py', 'vig-t', '--shapes', '64')


def test_every_name_builds_a_network() -> None:
    from benchmarks.networks import catalog

    known = catalog()
    assert {'vig-t-adapter', 'vit-b-window-adapter', 'deit-b-cls', 'resnet50'} <= set(known)
    for name in ('vig-t-cls', 'deit-t-cls', 'swin-t', 'convnext-t'):
        assert isinstance(known[name].build(), nn.Module)
