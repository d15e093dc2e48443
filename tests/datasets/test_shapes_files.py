import hashlib
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmvig.datasets import ShapesSpec, ensure_shapes, shapes_files
from mmvig.datasets.shapes import CLASSES

TINY = ShapesSpec(num_train=2, num_val=1, height=64, width=80, seed=0)


def digests(root: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = sorted(path for path in root.rglob('*') if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def siblings(root: Path) -> set[str]:
    return {path.name for path in root.parent.iterdir()}


def test_layout(shapes_root: Path, spec: ShapesSpec):
    assert {path.name for path in shapes_root.iterdir()} == {
        'shapes.json', 'annotations', 'img_dir', 'ann_dir',
    }  # fmt: skip
    for split, count in spec.counts().items():
        names = {f'{i:06d}' for i in range(count)}
        assert {p.stem for p in (shapes_root / 'img_dir' / split).glob('*.jpg')} == names
        assert {p.stem for p in (shapes_root / 'ann_dir' / split).glob('*.png')} == names


def test_same_seed_same_bytes_other_seed_other_images(tmp_path: Path):
    for name, spec in (('a', TINY), ('b', TINY), ('c', replace(TINY, seed=1))):
        ensure_shapes(tmp_path / name, spec)
    first, again, other = (digests(tmp_path / name) for name in 'abc')
    assert first == again
    assert all(first[name] != other[name] for name in first if name.endswith('.jpg'))


def test_more_images_keep_the_first_and_splits_differ(tmp_path: Path):
    ensure_shapes(tmp_path / 'few', TINY)
    ensure_shapes(tmp_path / 'more', replace(TINY, num_train=4))
    few, more = digests(tmp_path / 'few'), digests(tmp_path / 'more')
    assert all(more[name] == few[name] for name in few if name.endswith(('.jpg', '.png')))
    assert few['img_dir/train/000000.jpg'] != few['img_dir/val/000000.jpg']


def test_instances_and_label_maps_are_the_same_pixels(shapes_root: Path):
    coco = COCO(str(shapes_root / 'annotations/instances_train.json'))
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for image in coco.loadImgs(coco.getImgIds()):
        label_map = cv2.imread(
            str(shapes_root / 'ann_dir/train' / image['file_name'].replace('jpg', 'png')), -1
        )
        assert label_map.shape == (image['height'], image['width'])
        from_instances = np.zeros_like(label_map)
        for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
            mask = coco.annToMask(annotation).astype(bool)
            assert not from_instances[mask].any()
            from_instances[mask] = annotation['category_id']
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation['bbox'] == box
            assert annotation['area'] == mask.sum()
        np.testing.assert_array_equal(from_instances, label_map)


def test_existing_data_set_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ensure_shapes(tmp_path / 'shapes', TINY)
    monkeypatch.setattr(shapes_files, '_write', None)
    ensure_shapes(tmp_path / 'shapes', TINY)


def test_interrupted_drawing_leaves_nothing_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / 'shapes'
    draw_scene = shapes_files.draw_scene
    drawn = []

    def interrupt_third(*args):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(draw_scene(*args))
        return drawn[-1]

    monkeypatch.setattr(shapes_files, 'draw_scene', interrupt_third)
    with pytest.raises(KeyboardInterrupt):
        ensure_shapes(root, TINY)
    assert siblings(root) <= {'.shapes.lock'}
    monkeypatch.undo()

    # A process that is killed has no time to clean up.
    (tmp_path / '.shapes.partial' / 'img_dir').mkdir(parents=True)
    (tmp_path / '.shapes.partial' / 'img_dir' / 'stale.jpg').write_bytes(b'half')
    ensure_shapes(root, TINY)
    assert siblings(root) <= {'.shapes.lock', 'shapes'}
    assert not list(root.rglob('stale.jpg'))


def test_processes_at_the_same_time_draw_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, log = tmp_path / 'data' / 'shapes', tmp_path / 'log'
    write = shapes_files._write

    def write_and_tell(*args):
        with log.open('a') as file:
            file.write('drawn\n')
        write(*args)

    monkeypatch.setattr(shapes_files, '_write', write_and_tell)
    context = multiprocessing.get_context('fork')
    start = context.Barrier(3)

    def run():
        start.wait()
        ensure_shapes(root, replace(TINY, num_train=20))
        assert len(list((root / 'img_dir/train').iterdir())) == 20

    processes = [context.Process(target=run) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == 'drawn\n'


def test_other_parameters_are_refused_and_nothing_is_touched(tmp_path: Path):
    root = tmp_path / 'shapes'
    ensure_shapes(root, TINY)
    before = digests(root)
    with pytest.raises(ValueError, match='holds shapes with seed=0 but seed=5 is asked for'):
        ensure_shapes(root, replace(TINY, seed=5))
    assert digests(root) == before


@pytest.mark.parametrize('content', [None, '{', '[]', '{}'])
def test_folder_of_something_else_is_refused_and_nothing_is_touched(tmp_path: Path, content):
    root = tmp_path / 'shapes'
    root.mkdir()
    (root / 'mine.txt').write_text('mine')
    if content is not None:
        (root / 'shapes.json').write_text(content)
    before = digests(root)
    with pytest.raises(ValueError, match=r'choose another data_root, or remove it'):
        ensure_shapes(root, TINY)
    assert digests(root) == before


def test_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / 'shapes').mkdir()
    ensure_shapes(tmp_path / 'shapes', TINY)
    assert json.loads((tmp_path / 'shapes/shapes.json').read_text())['num_train'] == 2


@pytest.mark.parametrize(
    ('name', 'value'), [('num_train', 0), ('height', 32), ('width', 96.0), ('seed', -1)]
)
def test_spec_out_of_range(name: str, value: float):
    with pytest.raises(ValueError, match=f'{name} must be an integer >= .*, got {value}'):
        ShapesSpec(**{name: value})
