"""BGR to RGB without an index."""

from collections.abc import Iterable

from torch import Tensor


def reverse_channels(images: Iterable[Tensor]) -> list[Tensor]:
    """Reverses the channels of images (C, H, W); those that have other than three stay.

    mmengine takes the channels by `image[[2, 1, 0]]`. For that PyTorch copies the list to the
    device and waits until the device is done with all that it was given before, which at this
    point of a training step is the backward pass of the step before.
    """
    return [image.flip(0) if len(image) == 3 else image for image in images]
