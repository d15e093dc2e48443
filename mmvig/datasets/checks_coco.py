"""Checks of data in COCO layout: annotation file, categories against classes, images."""

import json
import os
from collections.abc import Sequence
from typing import Any

from mmengine.logging import print_log

from mmvig.datasets.checks_files import (
    first_line,
    image_fault,
    listed,
    require_paths,
    require_sound,
)

IMAGE_KEYS = {'id', 'file_name', 'height', 'width'}
ANNOTATION_KEYS = {'id', 'image_id', 'category_id', 'bbox', 'area'}


def check_coco(
    loader: str,
    dataset_cfg: dict,
    dataset: Any,
    metrics: list[dict],
    annotated: bool,
    open_files: bool,
) -> None:
    """Check what a detection dataset reads, and that its metrics read the same.

    Args:
        loader: Name of the data loader, for messages.
        dataset_cfg: The dataset's config.
        dataset: An `mmdet.CocoDataset` built from it, not yet initialised.
        metrics: Configs of the metrics that evaluate the loader.
        annotated: Whether annotations are needed.
        open_files: Whether to open the images.

    Raises:
        FileNotFoundError: If folders or annotation files are missing.
        ValueError: If the annotation file cannot be used or does not fit the classes, or images
            cannot be used.
    """
    folder = dataset.data_prefix.get('img', '')
    require_paths(loader, dataset, [path for path in (dataset.ann_file, folder) if path])
    content = _load(dataset.ann_file)
    _require_entries(dataset.ann_file, content, 'images', IMAGE_KEYS)
    _require_categories(loader, dataset_cfg, dataset, content['categories'])
    if annotated:
        _require_entries(dataset.ann_file, content, 'annotations', ANNOTATION_KEYS)
        with_mask = any(step.get('with_mask') for step in dataset_cfg.get('pipeline', ()))
        _require_usable(dataset, content, with_mask)
    for metric in metrics:
        _require_same_images(loader, dataset.ann_file, content, metric)
    if open_files:
        names = (image['file_name'] for image in content['images'])
        paths = (os.path.join(folder, name) for name in names)
        require_sound(loader, 'images', paths, image_fault)


def _load(path: str) -> dict[str, list]:
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except ValueError as error:  # of JSON, or of UTF-8
        size = os.path.getsize(path)
        reason = f'not JSON, {first_line(error)}' if size else 'empty (0 bytes)'
        raise ValueError(f'{path!r} is {reason}; replace it by a COCO annotation file') from None
    keys = content.keys() if isinstance(content, dict) else ()
    lacking = [key for key in ('images', 'categories') if key not in keys]
    if lacking:
        raise ValueError(
            f'{path!r} has no {listed(lacking)}; it must be an object with the lists "images", '
            '"annotations" and "categories" (COCO format)'
        )
    return content


def _require_entries(path: str, content: dict[str, list], kind: str, keys: set[str]) -> None:
    entries = content.get(kind)
    if not entries:
        raise ValueError(f'{path!r} has no {kind}; check how it was made, or set another ann_file')
    for entry in entries:
        if not keys <= entry.keys():
            raise ValueError(
                f'{path!r}: "{kind}" has an entry without {listed(sorted(keys - entry.keys()))}, '
                f'id {entry.get("id")!r}; every entry needs {", ".join(sorted(keys))}'
            )


def _require_categories(
    loader: str, dataset_cfg: dict, dataset: Any, categories: Sequence[dict]
) -> None:
    path, classes = dataset.ann_file, list(dataset.metainfo['classes'])
    names = [category['name'] for category in categories]
    lacking = [name for name in classes if name not in names]
    extra = [name for name in names if name not in classes]
    # Classes written out in the config may be a choice of the file's categories.
    chosen = 'classes' in (dataset_cfg.get('metainfo') or {})
    if lacking or (extra and not chosen):
        parts = [f'the file lacks {listed(lacking)}'] if lacking else []
        parts += [f'the classes lack {listed(extra)}'] if extra else []
        raise ValueError(
            f'{path!r}: category names do not match the {len(classes)} classes of {loader}: '
            f'{" and ".join(parts)}; set metainfo=dict(classes=...) of every dataset and '
            'num_classes of the heads, or rename the categories'
        )
    if extra:
        print_log(f'{path!r}: annotations of {listed(extra)} are left out', 'current')
    kept = [name for name in names if name in classes]
    if kept != classes:
        # mmdet numbers labels in the file's order and names them in the config's.
        raise ValueError(
            f'{path!r} lists the categories in another order than the classes of {loader}, so that '
            f'labels would get wrong names; set metainfo=dict(classes=...) to {tuple(kept)}'
        )


def _require_usable(dataset: Any, content: dict[str, list], with_mask: bool) -> None:
    """At least one annotation survives mmdet's filters, and masks are there if they are read."""
    path, classes = dataset.ann_file, dataset.metainfo['classes']
    images = {image['id'] for image in content['images']}
    categories = {entry['id'] for entry in content['categories'] if entry['name'] in classes}
    usable = [
        entry
        for entry in content['annotations']
        if entry['image_id'] in images
        and entry['category_id'] in categories
        and min(entry['bbox'][2:]) >= 1
        and entry['area'] > 0
    ]
    if not usable:
        raise ValueError(
            f'{path!r}: none of its {len(content["annotations"])} annotations can be used; each '
            'needs the image_id of an image, the category_id of a class, a bbox [x, y, width, '
            'height] of at least 1 pixel and an area above 0'
        )
    bare = [entry['id'] for entry in usable if with_mask and not entry.get('segmentation')]
    if bare:
        raise ValueError(
            f'{path!r}: annotations {listed(bare)} have no segmentation, which LoadAnnotations '
            'with_mask=True reads; add masks, or use a config without a mask head'
        )


def _require_same_images(loader: str, path: str, content: dict[str, list], metric: dict) -> None:
    """A metric's own annotation file knows the dataset's images."""
    other = metric.get('ann_file')
    if other is None or '://' in other or metric.get('backend_args'):
        return
    evaluator = loader.replace('dataloader', 'evaluator')
    remedy = f'{evaluator}.ann_file should be {path!r}, which {loader} reads'
    if not os.path.exists(other):
        raise FileNotFoundError(f'{evaluator}: {other!r} not found; {remedy}')
    if os.path.samefile(other, path):
        return
    known = {image['id'] for image in _load(other)['images']}
    unknown = [image['id'] for image in content['images'] if image['id'] not in known]
    if unknown:
        raise ValueError(f'{evaluator}: {other!r} has no images {listed(unknown)}; {remedy}')
