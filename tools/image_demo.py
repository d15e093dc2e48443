"""Draws predictions: `python tools/image_demo.py IMAGES CONFIG CHECKPOINT --out-dir FOLDER`."""

import argparse
import glob
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli
import numpy as np
import torch
from checkpoints import check_fits, load_state_dict
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from PIL import Image, ImageOps
from torch import nn

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description='Draw boxes and masks, or a colour map, on images.'
    )
    parser.add_argument('inputs', nargs='+', help='images, folders of images or quoted globs')
    cli.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out-dir', default='demo_out', help='default: %(default)s')
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: %(default)s',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='draw detections of at least this score (default: %(default)s)',
    )
    return parser.parse_args()


def find_images(inputs: list[str], out_dir: Path) -> dict[Path, Path]:
    """Maps every picture to be written to the image that it is made from.

    Images of a folder keep their place below it.

    Raises:
        FileNotFoundError: If an input names no image.
        ValueError: If a picture would overwrite an image or another picture.
    """
    pictures: dict[Path, Path] = {}
    for name in inputs:
        root = Path(name)
        if root.is_dir():
            found = [p for p in sorted(root.rglob('*')) if p.suffix.lower() in IMAGE_SUFFIXES]
        else:
            found = [root] if root.is_file() else [Path(p) for p in sorted(glob.glob(name))]
            found = [path for path in found if path.is_file()]
        if not found:
            raise FileNotFoundError(f'{name} is no image, folder with images or matching glob')
        for image in found:
            picture = out_dir / (image.relative_to(root) if root.is_dir() else image.name)
            if pictures.get(picture, image) != image:
                raise ValueError(
                    f'{pictures[picture]} and {image} would both be drawn to {picture}; '
                    'draw them in two runs'
                )
            pictures[picture] = image
    sources = {image.resolve() for image in pictures.values()}
    for picture, image in pictures.items():
        if picture.resolve() in sources:
            raise ValueError(f'--out-dir {out_dir} would overwrite {image}; name another folder')
    return pictures


def read_image(path: Path) -> np.ndarray:
    """Reads an image, upright, as (H, W, 3) BGR bytes.

    Raises:
        ValueError: If it cannot be read whole.
    """
    try:
        with Image.open(path) as image:
            rgb = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    except (OSError, SyntaxError) as error:  # Pillow: SyntaxError for a broken PNG
        raise ValueError(f'cannot read image {path}: {error}') from error
    return np.ascontiguousarray(rgb[..., ::-1])


def build_model(cfg: Config, checkpoint: str, device: str) -> tuple[nn.Module, Callable]:
    """Builds the config's model with a checkpoint's weights, and finds what runs it on an image.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the config has no test data, or the checkpoint cannot be read or is of
            another model.
    """
    if cfg.get('test_dataloader') is None:
        raise ValueError(
            f'{cfg.filename} has no test_dataloader, whose pipeline is what images go through; '
            'give one, such as its val_dataloader'
        )
    weights = load_state_dict(checkpoint)
    if cfg.get('default_scope') == 'mmseg':
        from mmseg.apis import inference_model as infer
        from mmseg.apis import init_model as init

        cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    else:
        from mmdet.apis import inference_detector as infer
        from mmdet.apis import init_detector as init
    model = init(cfg, checkpoint, device=device)
    check_fits(model, weights, checkpoint)
    return model, infer


def build_visualizer(cfg: Config, dataset_meta: dict[str, Any]) -> Any:
    """Builds the config's visualizer, writing files only where it is told to."""
    cfg.visualizer.vis_backends = None
    visualizer = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = dataset_meta
    return visualizer


def main() -> None:
    """Draws every input; one that cannot be read is named and left out."""
    args = parse_args()
    out_dir = Path(args.out_dir)
    pictures = find_images(args.inputs, out_dir)
    cfg = cli.load_config(args)
    cli.check_writable(out_dir)
    model, infer = build_model(cfg, args.checkpoint, args.device)
    visualizer = build_visualizer(cfg, model.dataset_meta)
    options = {} if cfg.get('default_scope') == 'mmseg' else {'pred_score_thr': args.score_thr}

    unread = 0
    for picture, path in pictures.items():
        try:
            image = read_image(path)
        except ValueError as error:
            print(f'error: {error}; left out', file=sys.stderr)
            unread += 1
            continue
        visualizer.add_datasample(
            path.name,
            image[..., ::-1],
            infer(model, image),
            draw_gt=False,
            out_file=str(picture),
            **options,
        )
        print(picture)
    if unread:
        sys.exit(1)


if __name__ == '__main__':
    cli.run(main)
