"""Checks of single files: there, whole, and holding what they should."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mmengine.logging import print_log
from PIL import Image

THREADS = 16
LISTED = 5  # values that a message lists before it only counts
JPEG_START, JPEG_END = b'\xff\xd8\xff', b'\xff\xd9'
PNG_START, PNG_END = b'\x89PNG\r\n\x1a\n', b'IEND\xaeB`\x82'
# Where the data of a dataset type come from.
SOURCES = {
    'CocoDataset': ' (COCO 2017: https://cocodataset.org/#download)',
    'ADE20KDataset': ' (ADEChallengeData2016.zip: http://sceneparsing.csail.mit.edu)',
    'CamVidDataset': ' (CamVid: docs/data.md of mmvig says how)',
}

Item = TypeVar('Item')


def require_paths(loader: str, dataset: Any, paths: Sequence[str]) -> None:
    """Raise `FileNotFoundError` that names every one of `paths` that does not exist."""
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        kind = type(dataset).__name__
        absent = ' and '.join(map(repr, missing))
        source = SOURCES.get(kind, '')
        raise FileNotFoundError(
            f'{loader} ({kind}): {absent} not found from {os.getcwd()!r}; put the data '
            f'there{source}, link an existing folder, or set data_root'
        )


def require_sound(
    loader: str, kind: str, items: Iterable[Item], fault: Callable[[Item], str | None]
) -> None:
    """Raise `ValueError` that counts the items with a fault and names the first.

    Args:
        loader: Name of the data loader, for the message.
        kind: What the items are, in the plural, for the message.
        items: What to look at.
        fault: Says of an item what is wrong with it, its path included, or None.
    """
    items = list(items)
    with ThreadPoolExecutor(THREADS) as pool:
        faults = [found for found in pool.map(fault, items) if found]
    if faults:
        raise ValueError(
            f'{loader}: {len(faults)} of {len(items)} {kind} cannot be used; {faults[0]}; '
            'replace the file, or take it out of the data set'
        )
    print_log(f'{loader}: {len(items)} {kind} are in order', 'current')


def image_fault(path: str) -> str | None:
    """What is wrong with an image file, or None.

    A JPEG or PNG with its proper first and last bytes passes without being decoded. Anything else
    is decoded: COCO itself has a sound JPEG with an odd end.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(len(PNG_START))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(PNG_END)))
            end = file.read()
    except OSError as error:
        return f'{path!r} cannot be read ({error.strerror})'
    if size == 0:
        return f'{path!r} is empty (0 bytes)'
    if start.startswith(JPEG_START) and end.endswith(JPEG_END):
        return None
    if start == PNG_START and end == PNG_END:
        return None
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error and others
        return f'{path!r} is corrupt ({first_line(error)})'
    return None


def first_line(error: Exception) -> str:
    """An exception's text, cut to its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def listed(values: Sequence[Any]) -> str:
    """The first few values, and how many more there are."""
    text = ', '.join(repr(value) for value in values[:LISTED])
    return text if len(values) <= LISTED else f'{text} and {len(values) - LISTED} more'
