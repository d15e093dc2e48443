"""The *shapes* data set on disk: written once, whole or not at all, in COCO and in mmseg layout.

<root>/shapes.json                            what the folder holds (`ShapesSpec`)
<root>/img_dir/{train,val}/000000.jpg ...     the images of both layouts
<root>/ann_dir/{train,val}/000000.png ...     label maps: 0 background, i + 1 class i
<root>/annotations/instances_{train,val}.json instances: category id i + 1 class i, masks as RLE
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock
from mmengine.logging import print_log
from mmengine.utils import ProgressBar
from pycocotools import mask as coco_mask

from mmvig.datasets.shapes import CLASSES, Scene, draw_scene

VERSION = 1  # of the pictures: to be raised with any change of what a seed gives
SPLITS = ('train', 'val')
SPEC_FILE = 'shapes.json'
MIN_SIDE = 64
JPEG_QUALITY = 92
BAR_STEPS = 25


@dataclass(frozen=True)
class ShapesSpec:
    """What a *shapes* data set holds. Image i of a split depends on the seed and the size alone.

    Attributes:
        num_train: Number of training images.
        num_val: Number of validation images.
        height: Image height in pixels.
        width: Image width in pixels.
        seed: Seed of everything random.

    Raises:
        ValueError: If a value is no integer or out of range.
    """

    num_train: int = 800
    num_val: int = 100
    height: int = 160
    width: int = 192
    seed: int = 0

    def __post_init__(self) -> None:
        least = {'num_train': 1, 'num_val': 1, 'height': MIN_SIDE, 'width': MIN_SIDE, 'seed': 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise ValueError(f'shapes: {name} must be an integer >= {minimum}, got {value!r}')

    def counts(self) -> dict[str, int]:
        """Number of images of each split."""
        return {'train': self.num_train, 'val': self.num_val}


def ensure_shapes(root: str | Path, spec: ShapesSpec) -> None:
    """Create the data set unless it is there.

    It is drawn into a hidden folder beside `root`, which takes its name when complete: whatever
    happens, `root` holds a whole data set or does not exist. Processes that ask at the same time
    wait for the first of them, which alone shows a progress bar.

    Args:
        root: Folder of the data set.
        spec: What it is to hold.

    Raises:
        ValueError: If `root` holds anything else; nothing in it is touched.
    """
    root = Path(root).resolve()  # a link to an empty folder elsewhere is filled there
    if _is_there(root, spec):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.parent / f'.{root.name}.lock'):
        if _is_there(root, spec):
            return
        partial = root.parent / f'.{root.name}.partial'
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        try:
            _write(partial, spec)
            partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_there(root: Path, spec: ShapesSpec) -> bool:
    """Whether `root` holds this very data set; False if there is nothing, an error otherwise."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    remedy = 'choose another data_root, or remove it to have it drawn anew'
    try:
        found = json.loads((root / SPEC_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f'{str(root)!r} exists and is no shapes data set (no readable {SPEC_FILE}); {remedy}'
        )
    wanted = _record(spec)
    if found != wanted:
        differ = [key for key in wanted if found.get(key) != wanted[key]]
        raise ValueError(
            f'{str(root)!r} holds shapes with {_values(found, differ)} but '
            f'{_values(wanted, differ)} is asked for; {remedy}'
        )
    return True


def _record(spec: ShapesSpec) -> dict[str, int]:
    return {'version': VERSION, **asdict(spec)}


def _values(record: dict[str, Any], keys: list[str]) -> str:
    return ', '.join(f'{key}={record.get(key)!r}' for key in keys)


def _write(root: Path, spec: ShapesSpec) -> None:
    """Write the data set into the new folder `root`."""
    print_log(
        f'Drawing the shapes data set: {_values(asdict(spec), list(asdict(spec)))}', 'current'
    )
    total = sum(spec.counts().values())
    bar, step = ProgressBar(total), max(1, total // BAR_STEPS)
    (root / 'annotations').mkdir(parents=True)
    for split_index, (split, count) in enumerate(spec.counts().items()):
        for folder in ('img_dir', 'ann_dir'):
            (root / folder / split).mkdir(parents=True)
        instances = _empty_instances()
        for index in range(count):
            rng = np.random.default_rng([spec.seed, split_index, index])
            scene = draw_scene(rng, spec.height, spec.width)
            _write_scene(root, split, f'{index:06d}', scene)
            _add_instances(instances, index, scene)
            if index % step == step - 1 or index == count - 1:  # a log shows every update
                bar.update(index % step + 1)
        path = root / 'annotations' / f'instances_{split}.json'
        path.write_text(json.dumps(instances), encoding='utf-8')
    bar.file.write('\n')
    (root / SPEC_FILE).write_text(json.dumps(_record(spec), indent=2) + '\n', encoding='utf-8')


def _write_scene(root: Path, split: str, stem: str, scene: Scene) -> None:
    _write_image(
        root / 'img_dir' / split / f'{stem}.jpg',
        scene.image,
        [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY],
    )
    label_map = np.zeros(scene.image.shape[:2], np.uint8)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        label_map[mask] = label + 1
    _write_image(root / 'ann_dir' / split / f'{stem}.png', label_map, [])


def _write_image(path: Path, image: np.ndarray, options: list[int]) -> None:
    """`cv2.imwrite`, which reports a full disk or a missing folder by returning False."""
    encoded = cv2.imencode(path.suffix, image, options)[1]
    path.write_bytes(encoded.tobytes())


def _empty_instances() -> dict[str, list]:
    categories = [{'id': i, 'name': name} for i, name in enumerate(CLASSES, start=1)]
    return {'images': [], 'annotations': [], 'categories': categories}


def _add_instances(instances: dict[str, list], index: int, scene: Scene) -> None:
    """Append a scene to COCO's `images` and `annotations`; boxes are [x, y, width, height]."""
    height, width = scene.image.shape[:2]
    instances['images'].append(
        {'id': index, 'file_name': f'{index:06d}.jpg', 'height': height, 'width': width}
    )
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        instances['annotations'].append({
            'id': len(instances['annotations']) + 1,
            'image_id': index,
            'category_id': label + 1,
            'bbox': coco_mask.toBbox(rle).tolist(),
            'area': int(mask.sum()),
            'iscrowd': 0,
            'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode('ascii')},
        })  # fmt: skip


class GeneratedShapes:
    """The part of a *shapes* dataset class that makes the files; goes before mm's class.

    Args:
        data_root: Folder of the data set.
        shapes: What it is to hold: arguments of `ShapesSpec`.
        **kwargs: Arguments of the dataset class that follows, which refuses what it does not know.
    """

    def __init__(
        self,
        *,
        data_root: str = 'data/shapes/',
        shapes: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.spec = ShapesSpec(**(shapes or {}))
        super().__init__(data_root=data_root, **kwargs)

    def create(self) -> None:
        """Create the files unless they are there; see `ensure_shapes`."""
        ensure_shapes(self.data_root, self.spec)

    def full_init(self) -> None:
        """Create the files unless they are there, then load as the class that follows does."""
        self.create()
        super().full_init()
