"""Checks that every backbone shares."""


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
