"""tools/image_demo.py: images, folders and globs in, pictures out, nothing overwritten."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tools.conftest import TOOLS, Run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with an image, another in a folder below, and a text file."""
    folder = tmp_path / 'images'
    (folder / 'more').mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'a.jpg')
    Image.fromarray(pixels).convert('L').save(folder / 'more' / 'grey.png')
    (folder / 'readme.txt').write_text('no image')
    return folder


def test_draws_folders_and_leaves_out_what_it_cannot_read(
    trained: Run, images: Path, tmp_path: Path
) -> None:
    whole = (images / 'a.jpg').read_bytes()
    (images / 'half.jpg').write_bytes(whole[: len(whole) // 2])
    command = [images, trained.config, trained.checkpoint, '--out-dir', tmp_path / 'out']
    done = subprocess.run(
        [sys.executable, TOOLS / 'image_demo.py', *command, '--device', 'cpu', '--score-thr', '0'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert f'error: cannot read image {images / "half.jpg"}: ' in done.stderr
    assert 'Traceback' not in done.stderr
    written = {
        path.relative_to(tmp_path / 'out').as_posix(): path for path in tmp_path.glob('out/**/*.*')
    }
    assert set(written) == {'a.jpg', 'more/grey.png'}
    for name, path in written.items():
        with Image.open(path) as picture, Image.open(images / name) as image:
            assert picture.size == image.size
            difference = np.asarray(picture, int) - np.asarray(image.convert('RGB'), int)
        assert np.abs(difference).max() > 50


@pytest.mark.parametrize('name', ['images/b.jpg', 'images/*.gif', 'empty'])
def test_inputs_that_name_no_image(fail, images: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / 'empty').mkdir()
    line = fail('image_demo.py', tmp_path / name, 'CONFIG', 'FILE', '--out-dir', tmp_path / 'out')
    assert f'{tmp_path / name} is no image' in line
    assert not (tmp_path / 'out').exists()


def test_nothing_is_overwritten(fail, images: Path) -> None:
    before = (images / 'a.jpg').read_bytes()
    line = fail('image_demo.py', images, 'CONFIG', 'FILE', '--out-dir', images)
    assert 'would overwrite' in line
    (images / 'more' / 'a.jpg').write_bytes(before)
    line = fail('image_demo.py', images / 'a.jpg', images / 'more' / 'a.jpg', 'CONFIG', 'FILE')
    assert 'would both be drawn to' in line
    assert (images / 'a.jpg').read_bytes() == before


def test_a_config_without_test_data(fail, images: Path, tmp_path: Path) -> None:
    config = tmp_path / 'model.py'
    config.write_text('test_dataloader = None')
    line = fail('image_demo.py', images / 'a.jpg', config, 'FILE', '--out-dir', tmp_path / 'out')
    assert f'{config} has no test_dataloader' in line
