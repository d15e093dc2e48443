"""Says what a checkpoint is, and classifies an image: `python tools/verify_checkpoint.py FILE`."""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path

import cli
import torch
from mmengine.registry import MODELS
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch import Tensor, nn

from mmvig.checkpoint import (
    Arch,
    find_state_dict,
    guess_arch,
    load_weights,
    read_checkpoint,
    weights_key,
)

# as the published networks are evaluated
IMAGE_SIZE = 224
CROP_SHARE = 0.875
# of the published adapters: base differs from the defaults
ADAPTERS = {'base': dict(deform_num_heads=12, deform_ratio=0.5)}
# names of the classifier's parts, older and newer
HEADS = ('head', 'classifier.head')
NORMS = {'ViG': ('norm',), 'ViGH': ('norm', 'classifier.norm')}
TOP = 5


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description='Read a checkpoint without executing anything in it; print its network, key '
        'coverage, number of parameters and checksums. Ends with status 2 where it does not fit.'
    )
    parser.add_argument('file', help='checkpoint: .pth or .safetensors, official or own')
    parser.add_argument('image', nargs='?', help='print the five likeliest ImageNet classes of it')
    cli.add_prefix_argument(parser)
    return parser.parse_args()


def file_digest(path: str) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values: the same in whatever file they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_backbone(arch: Arch, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The published backbone of a checkpoint, with a final norm where the checkpoint has one."""
    cfg = dict(type=arch.type, arch=arch.name)
    if arch.in_adapter:
        # batch norm has SyncBN's names
        adapter = dict(type='ViTAdapter', norm_cfg=dict(type='BN'), **ADAPTERS.get(arch.name, {}))
        return MODELS.build(dict(adapter, trunk=cfg))
    if arch.type != 'ViGH':
        cfg['final_norm'] = 'norm.weight' in state_dict
    return MODELS.build(cfg)


def check_arch(arch: Arch | None, path: str) -> Arch:
    """The network, where it can be built from its name.

    Raises:
        ValueError: If it is none of the published ones.
    """
    if arch is None:
        raise ValueError(f'{path} is of none of the networks here')
    if arch.name is None:
        raise ValueError(f'{path} is of {arch}, which is none of the published networks')
    return arch


def check_head(arch: Arch, state_dict: Mapping[str, Tensor], path: str) -> tuple[str, str]:
    """Names of the classifier's norm and linear layer.

    Raises:
        ValueError: If the checkpoint has none, or classifies by other means than the mean token.
    """
    if arch.type in NORMS and not arch.in_adapter:
        for head in HEADS:
            if f'{head}.weight' in state_dict:
                return next(n for n in NORMS[arch.type] if f'{n}.weight' in state_dict), head
        raise ValueError(f'{path} holds no classifier ({" or ".join(HEADS)}), only the backbone')
    raise ValueError(f'images are classified with ViG and ViG-H, not with {arch}')


def classify(
    backbone: nn.Module, state_dict: Mapping[str, Tensor], norm: str, head: str, image: Tensor
) -> Tensor:
    """Probabilities (classes,) of an image (3, H, W), with the classifier of the state dict.

    norm and head are the names of its layers, as `check_head` finds them.
    """
    params = {k: v.float() for k, v in state_dict.items()}
    if hasattr(backbone, 'outnorm3'):  # ViGH; ViG has its norm in the backbone
        backbone.outnorm3.load_state_dict({k: params[f'{norm}.{k}'] for k in ('weight', 'bias')})
    with torch.no_grad():
        features = backbone.eval()(image[None])[-1].mean((2, 3))
        logits = nn.functional.linear(features, params[f'{head}.weight'], params[f'{head}.bias'])
    return logits[0].softmax(-1)


def read_image(path: str) -> Tensor:
    """Reads an image as the published networks are evaluated: (3, 224, 224).

    Raises:
        ValueError: If it cannot be read.
    """
    transform = create_transform(
        IMAGE_SIZE, is_training=False, interpolation='bicubic', crop_pct=CROP_SHARE
    )
    try:
        with Image.open(path) as image:
            return transform(image.convert('RGB'))
    except (OSError, SyntaxError) as error:  # Pillow: SyntaxError for a broken PNG
        raise ValueError(f'cannot read image {path}: {error}') from error


def main() -> None:
    """Prints what the checkpoint is, part by part.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    args = parse_args()
    if not Path(args.file).is_file():
        found = 'is a folder, not a file' if Path(args.file).is_dir() else 'does not exist'
        raise FileNotFoundError(f'checkpoint {args.file} {found}')
    checkpoint = read_checkpoint(args.file)
    state_dict = find_state_dict(checkpoint, args.file, args.prefix)
    key = weights_key(checkpoint)
    place = f'under {key!r}' if key else 'bare state dict'
    total = sum(t.numel() for t in state_dict.values())
    print(f'file        {args.file}, SHA-256 {file_digest(args.file)}')
    print(f'weights     {place}, {len(state_dict)} tensors, SHA-256 {weights_digest(state_dict)}')

    arch = check_arch(guess_arch({k: tuple(v.shape) for k, v in state_dict.items()}), args.file)
    print(f'network     {arch}')
    backbone = build_backbone(arch, state_dict)
    fitted = load_weights(backbone, state_dict, args.file)
    own = backbone.state_dict()
    print(
        f'coverage    {len(fitted.tensors)} of the {len(own)} tensors of the backbone, '
        f'{len(fitted.resized)} of them resized; not used: {", ".join(fitted.left_out) or "none"}'
    )
    params = sum(p.numel() for p in backbone.parameters())
    print(f'parameters  {total:,} values in the file; {params:,} parameters of the backbone')
    if args.image:
        names = ImageNetInfo()
        norm, head = check_head(arch, state_dict, args.file)
        scores = classify(backbone, state_dict, norm, head, read_image(args.image))
        for score, index in zip(*(t.tolist() for t in scores.topk(TOP)), strict=True):
            print(f'{score:10.1%}  {names.index_to_description(index)}')


if __name__ == '__main__':
    cli.run(main)
