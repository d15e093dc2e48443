"""Multiply-adds and parameters of a config's model, without running it and without a GPU.

`python tools/get_flops.py configs/detection/vig_t_maskrcnn.py --shape 800 1344`
"""

import argparse
import json
from pathlib import Path

import cli
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvig.analysis import Cost, count_backbone, count_model

DETECTION_SHAPE = (800, 1344)  # 1333 x 800 pixels, padded to multiples of 32
COLUMNS = ('paper', 'everything')


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description='Multiply-adds and parameters of a model, by part.',
        epilog='Two columns: "paper" counts as the counter behind the published figures does, '
        'which misses the second linear of SwiGLU, the recurrence and the sampling of deformable '
        'attention; "everything" has those, too. One FLOP of the paper is one multiply-add.',
    )
    cli.add_config_arguments(parser)
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='image height and width in pixels, padding included (default: the crop of a '
        f'segmentation config, else {" ".join(map(str, DETECTION_SHAPE))})',
    )
    parser.add_argument('--backbone-only', action='store_true', help='leave out neck and heads')
    parser.add_argument('--json', metavar='FILE', help='write the figures here, too')
    return parser.parse_args()


def choose_shape(args: argparse.Namespace, cfg: Config) -> tuple[int, int]:
    """Height and width of the image.

    Raises:
        ValueError: If one is not positive.
    """
    shape = tuple(args.shape or cfg.model.get('data_preprocessor', {}).get('size', DETECTION_SHAPE))
    if min(shape) < 1:
        raise ValueError(f'--shape must be a height and a width in pixels, got {shape}')
    return shape


def count(args: argparse.Namespace, cfg: Config, shape: tuple[int, int]) -> Cost:
    """Builds the model with random weights and counts."""
    init_default_scope(cfg.default_scope)
    if args.backbone_only:
        return count_backbone(MODELS.build(cfg.model.backbone), *shape)
    return count_model(MODELS.build(cfg.model), *shape)


def print_table(cost: Cost) -> None:
    """One row a part, in the order in which the parts run; sums; parameters."""
    row = '{:<28}{:>18}{:>14}'.format
    print(row('G multiply-adds', 'as the paper', 'everything'))
    for part, macs in cost.everything.items():
        print(row(f'  {part}', f'{cost.paper.get(part, 0) / 1e9:.3f}', f'{macs / 1e9:.3f}'))
    for name, backbone_only in (('backbone', True), ('total', False)):
        sums = (f'{cost.total(column, backbone_only) / 1e9:.3f}' for column in COLUMNS)
        print(row(name, *sums))
    print('parameters')
    for name, params in (*cost.params.items(), ('total', sum(cost.params.values()))):
        print(f'  {name:<26}{params:>18,}')
    if cost.uncounted:
        print(f'without a formula: {", ".join(sorted(cost.uncounted))}')


def main() -> None:
    """Prints the table; writes the figures where asked."""
    args = parse_args()
    cfg = cli.load_config(args)
    shape = choose_shape(args, cfg)
    if args.json:
        cli.check_writable(Path(args.json).parent)
    cost = count(args, cfg, shape)
    print(f'{args.config}, one image of {shape[0]} x {shape[1]} pixels')
    print_table(cost)
    if args.json:
        record = dict(
            config=args.config,
            height=shape[0],
            width=shape[1],
            params=cost.params,
            uncounted=sorted(cost.uncounted),
            **{column: dict(getattr(cost, column)) for column in COLUMNS},
            **{f'backbone_{column}': cost.total(column, True) for column in COLUMNS},
            **{f'total_{column}': cost.total(column) for column in COLUMNS},
        )
        Path(args.json).write_text(json.dumps(record, indent=1))


if __name__ == '__main__':
    cli.run(main)
