"""Every message that bad data gets, through configs as a user has them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from torch.utils.data import TensorDataset

from mmvig.datasets import check_data
from mmvig.datasets.checks_files import image_fault
from mmvig.datasets.shapes import CLASSES

JSON = 'annotations/instances_train.json'
IMAGE = 'img_dir/train/000002.jpg'
LABELS = 'ann_dir/train/000002.png'


@pytest.fixture
def data(tmp_path: Path, shapes_root: Path) -> Path:
    """A copy of a data set, to be spoilt."""
    return Path(shutil.copytree(shapes_root, tmp_path / 'mine'))


def detection(root: Path, **dataset: object) -> Config:
    """A user's own data in COCO layout: the stock dataset type."""
    pytest.importorskip('mmdet')
    train = {
        'type': 'CocoDataset',
        'data_root': str(root),
        'ann_file': JSON,
        'data_prefix': {'img': 'img_dir/train/'},
        'metainfo': {'classes': CLASSES},
        'pipeline': [{'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True}],
        **dataset,
    }
    return Config({'default_scope': 'mmdet', 'train_dataloader': {'dataset': train}})


def segmentation(root: Path, **dataset: object) -> Config:
    """A user's own data in mmseg layout: the stock dataset type."""
    pytest.importorskip('mmseg')
    train = {
        'type': 'BaseSegDataset',
        'data_root': str(root),
        'data_prefix': {'img_path': 'img_dir/train', 'seg_map_path': 'ann_dir/train'},
        'metainfo': {'classes': ('background', *CLASSES)},
        **dataset,
    }
    return Config({'default_scope': 'mmseg', 'train_dataloader': {'dataset': train}})


def message(cfg: Config, error: type[Exception] = ValueError, **kwargs: bool) -> str:
    """The one line that a config's data get."""
    with pytest.raises(error) as caught:
        check_data(cfg, **kwargs)
    text = str(caught.value)
    assert '\n' not in text
    return text


def edit_json(data: Path, edit) -> None:
    path = data / JSON
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_sound_data_pass(data: Path):
    check_data(detection(data))
    check_data(segmentation(data))


def test_loaders_that_cannot_be_built(data: Path):
    cfg = detection(data)
    cfg.train_dataloader.update(
        num_workers=0, persistent_workers=False, collate_fn=dict(type='one_buffer_collate')
    )
    check_data(cfg)
    cfg.train_dataloader.collate_fn.type = 'one_bufer_collate'
    assert "train_dataloader.collate_fn.type is 'one_bufer_collate', which no" in message(cfg)
    cfg.train_dataloader.update(collate_fn=None, persistent_workers=True)
    assert 'set train_dataloader.persistent_workers=False' in message(cfg)


def test_shapes_are_created_by_the_check(tmp_path: Path):
    pytest.importorskip('mmdet')
    cfg = detection(
        tmp_path / 'new',
        type='ShapesDetDataset',
        shapes={'num_train': 2, 'num_val': 1, 'height': 64, 'width': 64},
    )
    check_data(cfg)
    assert (tmp_path / 'new' / JSON).is_file()


def test_one_process_a_host_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    check_data(detection(tmp_path / 'nothing'))


def test_remote_storage_is_left_alone(tmp_path: Path):
    check_data(detection(tmp_path / 'nothing', backend_args={'backend': 'petrel'}))
    check_data(detection(tmp_path, ann_file='s3://coco/a.json', data_prefix={'img': 's3://coco/'}))
    message(detection(tmp_path / 'nothing', backend_args={'backend': 'local'}), FileNotFoundError)


@pytest.mark.parametrize(
    ('path', 'scope', 'parts'),
    [
        (
            'detection/_base_/datasets/coco_instance.py',
            'mmdet',
            ('instances_train2017.json', 'train2017/', 'https://cocodataset.org'),
        ),
        (
            'segmentation/_base_/datasets/ade20k.py',
            'mmseg',
            ('images/training', 'annotations/training', 'http://sceneparsing.csail.mit.edu'),
        ),
        (
            'segmentation/_base_/datasets/camvid.py',
            'mmseg',
            ('img_dir/train', 'ann_dir/train', 'docs/data.md'),
        ),
    ],
)
def test_missing_data_root(path: str, scope: str, parts: tuple, tmp_path: Path, monkeypatch):
    pytest.importorskip(scope)
    cfg = Config.fromfile(Path(__file__).parents[2] / 'configs' / path)
    cfg.default_scope = scope
    monkeypatch.chdir(tmp_path)
    text = message(cfg, FileNotFoundError)
    assert 'train_dataloader' in text
    assert repr(str(tmp_path)) in text
    assert 'set data_root' in text
    assert all(part in text for part in parts)


def test_dataset_that_is_not_mmengines_is_left_alone():
    dataset = {'type': TensorDataset}
    check_data(Config({'val_dataloader': {'dataset': dataset}}))


def test_wrapped_datasets_are_checked(data: Path):
    cfg = detection(data)
    inner = cfg.train_dataloader.dataset
    missing = {**inner, 'ann_file': 'annotations/other.json'}
    concat = {'type': 'ConcatDataset', 'datasets': [inner, missing]}
    cfg.train_dataloader.dataset = {'type': 'RepeatDataset', 'times': 2, 'dataset': concat}
    assert 'annotations/other.json' in message(cfg, FileNotFoundError)


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        (b'', 'is empty (0 bytes)'),
        (b'{"images": [', 'is not JSON'),
        (b'\xff\xfe\x00', 'is not JSON'),
        (b'[]', "has no 'images', 'categories'"),
        (b'{"images": [], "categories": []}', 'has no images'),
    ],
)
def test_annotation_file_without_content(data: Path, content: bytes, expected: str):
    (data / JSON).write_bytes(content)
    text = message(detection(data))
    assert expected in text
    assert repr(str(data / JSON)) in text


def test_no_annotations(data: Path):
    edit_json(data, lambda content: content['annotations'].clear())
    assert 'has no annotations' in message(detection(data))


def test_no_annotations_are_fine_where_results_are_only_formatted(data: Path):
    edit_json(data, lambda content: content.pop('annotations'))
    cfg = detection(data)
    cfg.test_dataloader = cfg.pop('train_dataloader')
    cfg.test_evaluator = {'type': 'CocoMetric', 'format_only': True}
    check_data(cfg)


def test_annotation_without_area(data: Path):
    edit_json(data, lambda content: content['annotations'][3].pop('area'))
    assert "an entry without 'area', id 4" in message(detection(data))


def test_annotations_of_unknown_images(data: Path):
    def edit(content):
        for image in content['images']:
            image['id'] += 100

    edit_json(data, edit)
    assert 'can be used; each needs the image_id of an image' in message(detection(data))


def test_annotation_without_mask(data: Path):
    edit_json(data, lambda content: content['annotations'][0].update(segmentation=[]))
    assert 'annotations 1 have no segmentation' in message(detection(data))
    check_data(detection(data, pipeline=[{'type': 'LoadAnnotations', 'with_bbox': True}]))


def test_category_names_of_stock_classes(data: Path):
    text = message(detection(data, metainfo=None))
    assert "do not match the 80 classes of train_dataloader: the file lacks 'person'" in text
    assert 'and 75 more' in text
    assert "the classes lack 'circle', 'star'" in text


def test_category_spelt_otherwise(data: Path):
    edit_json(data, lambda content: content['categories'][0].update(name='Circle'))
    text = message(detection(data))
    assert "the file lacks 'circle' and the classes lack 'Circle'" in text


def test_categories_in_another_order(data: Path):
    edit_json(data, lambda content: content['categories'].reverse())
    assert f'to {CLASSES[::-1]}' in message(detection(data))


def test_chosen_categories_pass(data: Path):
    check_data(detection(data, metainfo={'classes': ('circle', 'star', 'ring')}))


def test_metric_reads_other_file(data: Path):
    cfg = detection(data)
    cfg.val_dataloader = cfg.pop('train_dataloader')
    cfg.val_evaluator = {'type': 'CocoMetric', 'ann_file': str(data / 'none.json')}
    text = message(cfg, FileNotFoundError)
    assert f'val_evaluator.ann_file should be {str(data / JSON)!r}' in text

    (data / 'none.json').write_text(json.dumps({'images': [], 'categories': []}))
    assert 'has no images 0, 1, 2, 3, 4; val_evaluator.ann_file should be' in message(cfg)


@pytest.mark.parametrize('config', [detection, segmentation])
@pytest.mark.parametrize('spoil', ['empty', 'garbage', 'truncated'])
def test_corrupt_image_is_named(data: Path, config, spoil: str):
    path = data / IMAGE
    content = {
        'empty': b'',
        'garbage': bytes(range(256)) * 20,
        'truncated': path.read_bytes()[:1500],
    }[spoil]
    path.write_bytes(content)
    text = message(config(data))
    assert '1 of 5 images cannot be used' in text
    assert repr(str(path)) in text
    check_data(config(data), open_files=False)


def test_missing_image_is_named(data: Path):
    (data / IMAGE).unlink()
    assert f'{str(data / IMAGE)!r} cannot be read' in message(detection(data))


def test_sound_images_pass_whatever_their_ends(data: Path, tmp_path: Path):
    path = data / IMAGE
    path.write_bytes(path.read_bytes() + bytes(64))  # as some cameras leave them
    assert image_fault(str(path)) is None
    for suffix in ('png', 'bmp', 'webp'):
        Image.new('RGB', (20, 10)).save(tmp_path / f'a.{suffix}')
        assert image_fault(str(tmp_path / f'a.{suffix}')) is None
    png = tmp_path / 'a.png'
    noise = np.random.default_rng(0).integers(256, size=(30, 30), dtype=np.uint8)
    Image.fromarray(noise).save(png)
    png.write_bytes(png.read_bytes()[:300])
    assert 'is corrupt' in image_fault(str(png))


def test_no_images_with_the_suffix(data: Path):
    assert 'no files *.tif in ' in message(segmentation(data, img_suffix='.tif'))


def test_missing_label_map(data: Path):
    (data / LABELS).unlink()
    text = message(segmentation(data), FileNotFoundError, open_files=False)
    assert '1 of 5 images have no label map' in text
    assert repr(str(data / IMAGE)) in text
    assert repr(str(data / LABELS)) in text


def test_no_label_maps_are_fine_where_results_are_only_formatted(data: Path):
    shutil.rmtree(data / 'ann_dir')
    cfg = segmentation(data)
    cfg.test_dataloader = cfg.pop('train_dataloader')
    cfg.test_evaluator = {'type': 'IoUMetric', 'format_only': True}
    check_data(cfg)


def write_labels(data: Path, *ids: int, mode: str = 'L') -> None:
    pixels = np.resize(np.array(ids, np.uint8), (96, 128))
    Image.fromarray(pixels).convert(mode).save(data / LABELS)


def test_label_ids_beyond_the_classes(data: Path):
    write_labels(data, 0, 8, 9, 200)
    text = message(segmentation(data))
    assert f'{str(data / LABELS)!r} holds 9, 200, allowed are 0..8, 255' in text


def test_ignored_reduced_and_mapped_label_ids(data: Path):
    write_labels(data, 0, 8, 255)
    check_data(segmentation(data))
    # With reduce_zero_label, ids 1..n are the classes and 0 is ignored.
    write_labels(data, 0, 9, 255)
    check_data(segmentation(data, reduce_zero_label=True))
    write_labels(data, 0, 10)
    text = message(segmentation(data, reduce_zero_label=True))
    assert 'holds 10, allowed are 0..9, 255' in text
    # A choice of a data set's classes: others become ignored.
    pytest.importorskip('mmseg')
    write_labels(data, 0, 8, 10)
    check_data(segmentation(data, type='CamVidDataset', metainfo={'classes': ('Sky', 'Car')}))


def test_label_map_in_colour(data: Path):
    write_labels(data, 1, 2, mode='RGB')
    assert 'has 3 channels, a label map has one' in message(segmentation(data))


def test_corrupt_label_map(data: Path):
    (data / LABELS).write_bytes(b'no picture')
    text = message(segmentation(data))
    assert f'1 of 5 label maps cannot be used; {str(data / LABELS)!r} is corrupt' in text
