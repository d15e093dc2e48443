"""Checks that every backbone shares."""

from collections.abc import Sequence


def parse_arch(arch: str | dict, zoo: dict[str, dict]) -> dict:
    """Settings of an arch: the name of an entry of `zoo`, or a dict with the same keys.

    Raises:
        ValueError: For an unknown name, or a dict with missing or unknown keys.
    """
    if isinstance(arch, str):
        if arch not in zoo:
            raise ValueError(f'unknown arch {arch!r}: choose one of {", ".join(zoo)}, or a dict')
        return dict(zoo[arch])
    keys = set(next(iter(zoo.values())))
    if set(arch) != keys:
        raise ValueError(f'arch needs exactly the keys {sorted(keys)}, got {sorted(arch)}')
    return dict(arch)


def ascending_indices(indices: tuple[int, ...], count: int, what: str) -> tuple[int, ...]:
    """Indices of `count` things, counted from the first; negative ones count from the last.

    Args:
        indices: The indices.
        count: Number of things.
        what: Their name, for the messages.

    Raises:
        ValueError: If they are no sequence of integers, if there are none, one is out of range, or
            they do not ascend.
    """
    if not isinstance(indices, Sequence) or not all(isinstance(i, int) for i in indices):
        raise ValueError(f'out_indices must be a tuple such as (0, {count - 1}), got {indices!r}')
    if bad := [i for i in indices if not -count <= i < count]:
        raise ValueError(f'out_indices {bad} out of range: the {count} {what} are 0 to {count - 1}')
    counted = tuple(i % count for i in indices)
    if not counted or list(counted) != sorted(set(counted)):
        raise ValueError(
            f'out_indices {tuple(indices)} must ascend, without repeats, and name at least one'
        )
    return counted


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Drop path of each of `depth` blocks, rising linearly from 0 to `last`.

    Raises:
        ValueError: If `last` is no probability below 1.
    """
    if not 0 <= last < 1:
        raise ValueError(f'drop_path_rate must be at least 0 and below 1, got {last}')
    return [last * i / max(depth - 1, 1) for i in range(depth)]
