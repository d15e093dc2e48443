"""Whether a neck, or heads without one, take the channels that the backbone gives."""

from collections.abc import Iterator, Sequence

from torch import nn

from mmvig.engine.backbones import unwrap


def check_channels(model: nn.Module) -> None:
    """Raises where a detector or segmentor would fail at its first image.

    Of backbones that have `out_channels`, as mmvig's have, and of necks and decode heads that have
    `in_channels`.

    Args:
        model: The model, in a distributed wrapper or not.

    Raises:
        ValueError: If the channels differ; says which setting to change, and to what.
    """
    model = unwrap(model)
    backbone = getattr(model, 'backbone', None)
    given = getattr(backbone, 'out_channels', None)
    if given is None:
        return
    for name, taken, wanted in _readers(model, list(given)):
        if taken != wanted:
            raise ValueError(
                f'{name}.in_channels is {taken}, but the {len(given)} maps of '
                f'{type(backbone).__name__} that it reads have {wanted} channels: '
                f'set {name}=dict(in_channels={wanted})'
            )


def _readers(
    model: nn.Module, given: list[int]
) -> Iterator[tuple[str, list[int] | int, list[int] | int]]:
    """Setting, channels that are read, and those that are given, of all that read the maps."""
    neck = getattr(model, 'neck', None)
    if neck is not None:
        taken = getattr(neck, 'in_channels', None)
        if isinstance(taken, Sequence):
            yield 'neck', list(taken), given
        elif isinstance(taken, int):
            yield 'neck', taken, given[-1]
        return
    for name in ('decode_head', 'auxiliary_head'):
        heads = getattr(model, name, None)
        for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
            taken, index = getattr(head, 'in_channels', None), getattr(head, 'in_index', None)
            several = isinstance(taken, Sequence)
            indices = index if isinstance(index, Sequence) else [index]
            # heads that concatenate their maps have the sum of their channels: one for several
            if several != isinstance(index, Sequence) or taken is None:
                continue
            if all(isinstance(i, int) and -len(given) <= i < len(given) for i in indices):
                wanted = [given[i] for i in indices]
                yield (name, list(taken), wanted) if several else (name, taken, wanted[0])
