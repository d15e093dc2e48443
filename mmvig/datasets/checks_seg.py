"""Checks of data in mmseg layout: folders, pairs of image and label map, ids of classes."""

import os
from typing import Any

import numpy as np
from PIL import Image

from mmvig.datasets.checks_files import (
    first_line,
    image_fault,
    listed,
    require_paths,
    require_sound,
)

IDS = 256


def check_seg(loader: str, dataset: Any, annotated: bool, open_files: bool) -> None:
    """Check what a segmentation dataset reads.

    Args:
        loader: Name of the data loader, for messages.
        dataset: An `mmseg.BaseSegDataset`, not yet initialised.
        annotated: Whether label maps are needed.
        open_files: Whether to open images and label maps.

    Raises:
        FileNotFoundError: If folders, the list of names or label maps are missing.
        ValueError: If there are no images, or files that cannot be used.
    """
    images = dataset.data_prefix.get('img_path', '')
    label_maps = dataset.data_prefix.get('seg_map_path') if annotated else None
    require_paths(
        loader, dataset, [path for path in (images, label_maps, dataset.ann_file) if path]
    )
    samples = dataset.load_data_list()
    if not samples:
        wanted = f'files *{dataset.img_suffix} in {images!r}'
        where = f'names in {dataset.ann_file!r}' if dataset.ann_file else wanted
        raise ValueError(f'{loader}: no {where}; set data_prefix and img_suffix to where they are')
    if label_maps:
        _require_label_maps(loader, samples)
    if not open_files:
        return
    require_sound(loader, 'images', (sample['img_path'] for sample in samples), image_fault)
    if label_maps:
        allowed = _allowed_ids(dataset)
        paths = (sample['seg_map_path'] for sample in samples)
        require_sound(loader, 'label maps', paths, lambda path: _label_map_fault(path, allowed))


def _require_label_maps(loader: str, samples: list[dict]) -> None:
    missing = [sample for sample in samples if not os.path.exists(sample['seg_map_path'])]
    if missing:
        first = missing[0]
        raise FileNotFoundError(
            f'{loader}: {len(missing)} of {len(samples)} images have no label map; '
            f'{first["img_path"]!r} needs {first["seg_map_path"]!r}; add it or remove the image, '
            'or set seg_map_suffix'
        )


def _allowed_ids(dataset: Any) -> np.ndarray:
    """Which ids a label map may hold, (256,) bool: those that end up as a class or as ignored.

    The steps are those of mmseg's `LoadAnnotations`.
    """
    ids = np.arange(IDS)
    if dataset.reduce_zero_label:
        ids = np.where((ids == 0) | (ids == 255), 255, ids - 1)
    final = ids.copy()
    for old, new in (dataset.label_map or {}).items():
        final[ids == old] = new
    return (final < len(dataset.metainfo['classes'])) | (final == dataset.ignore_index)


def _label_map_fault(path: str, allowed: np.ndarray) -> str | None:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error and others
        return f'{path!r} is corrupt ({first_line(error)})'
    if pixels.ndim != 2:
        return f'{path!r} has {pixels.shape[-1]} channels, a label map has one, of class ids'
    if pixels.min() < 0 or pixels.max() >= IDS:
        return f'{path!r} holds ids beyond 0..255: {pixels.min()}..{pixels.max()}'
    found = np.flatnonzero(np.bincount(pixels.ravel(), minlength=IDS))
    wrong = found[~allowed[found]].tolist()
    if not wrong:
        return None
    return f'{path!r} holds {listed(wrong)}, allowed are {_ranges(np.flatnonzero(allowed))}'


def _ranges(ids: np.ndarray) -> str:
    """Ascending ids in short: 0..10, 255."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return ', '.join(f'{run[0]}..{run[-1]}' if len(run) > 1 else f'{run[0]}' for run in runs)
