"""Sizes of tiles and grids; plain integers, since a launch's own time is mostly Python's."""

from functools import lru_cache

import torch


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of 2 from n up."""
    return 1 << (n - 1).bit_length()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; on the CPU, where Triton's interpreter runs, a few."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3


def num_programs(tiles: int, device: torch.device, per_multiprocessor: int) -> int:
    """For kernels that loop over tiles: at most one program a tile, at most so many at once."""
    return max(1, min(tiles, per_multiprocessor * multiprocessors(device)))
