"""Writes a checkpoint's weights as safetensors: `python tools/convert_checkpoint.py IN OUT`."""

import argparse
from pathlib import Path

import cli
import torch
from safetensors.torch import save_file
from verify_checkpoint import weights_digest

from mmvig.checkpoint import find_state_dict, guess_arch, read_checkpoint


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description='Write the best weights of a checkpoint (EMA where there is one), and nothing '
        'else of it, as safetensors. Names and values stay as they are; prefixes of wrappers '
        '(module., backbone.) are cut off. Nothing in the checkpoint is executed.'
    )
    parser.add_argument('source', metavar='IN', help='checkpoint: .pth or .safetensors')
    parser.add_argument('target', metavar='OUT', help='file to write: .safetensors')
    cli.add_prefix_argument(parser)
    return parser.parse_args()


def check_target(target: Path) -> None:
    """Refuses to overwrite, and other formats.

    Raises:
        ValueError: If the name has another suffix, or the file or no folder for it is there.
    """
    if target.suffix != '.safetensors':
        raise ValueError(f'{target} must end with .safetensors')
    if target.exists():
        raise ValueError(f'{target} exists; remove it, or name another file')
    if not target.parent.is_dir():
        raise ValueError(f'{target.parent} is no folder')


def main() -> None:
    """Converts, and reads the result back before it gets its name."""
    args = parse_args()
    target = Path(args.target)
    check_target(target)
    state_dict = find_state_dict(read_checkpoint(args.source), args.source, args.prefix)
    # safetensors refuses tensors that share memory
    tensors = {
        k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in state_dict.items()
    }
    arch = guess_arch({k: tuple(v.shape) for k, v in tensors.items()})
    metadata = {'format': 'pt', 'network': str(arch)} if arch else {'format': 'pt'}
    partial = target.with_suffix('.partial')
    try:
        save_file(tensors, partial, metadata=metadata)
        written = read_checkpoint(str(partial))
        assert weights_digest(written) == weights_digest(state_dict)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    print(
        f'{target}: {len(tensors)} tensors of {arch or "a network that is none of ours"}, '
        f'SHA-256 of the weights {weights_digest(state_dict)}'
    )


if __name__ == '__main__':
    cli.run(main)
