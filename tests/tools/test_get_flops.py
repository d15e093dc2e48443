"""Command line of get_flops.py."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.tools.conftest import ROOT, run_tool

CONFIG = ROOT / 'configs' / 'segmentation' / 'vig_t_linear.py'


def test_table_and_file(tmp_path: Path) -> None:
    out = run_tool('get_flops.py', CONFIG, '--json', 'flops.json', cwd=tmp_path)
    record = json.loads((tmp_path / 'flops.json').read_text())
    assert (record['height'], record['width']) == (512, 512)  # the config's crop
    assert record['paper']['heads'] == 32 * 32 * (192 * 150 + 150)
    assert record['total_everything'] == sum(record['everything'].values())
    assert f'{record["total_everything"] / 1e9:.3f}' in out
    assert f'{record["params"]["backbone"]:,}' in out


def test_backbone_only(tmp_path: Path) -> None:
    out = run_tool(
        'get_flops.py', CONFIG, '--backbone-only', '--shape', '4096', '2048', cwd=tmp_path
    )
    assert '4096 x 2048 pixels' in out
    assert 'recurrence' in out and 'heads' not in out


def test_mistakes_end_in_one_line(fail: Callable[..., str], tmp_path: Path) -> None:
    assert 'must be a height and a width' in fail('get_flops.py', CONFIG, '--shape', 0, 64)
    assert 'smaller than one patch' in fail('get_flops.py', CONFIG, '--shape', 8, 64)
    (tmp_path / 'file').touch()
    assert 'cannot write' in fail('get_flops.py', CONFIG, '--json', tmp_path / 'file' / 'x.json')
