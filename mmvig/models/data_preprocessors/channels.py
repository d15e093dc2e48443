"""BGR to RGB without an index."""

from typing import Any

from torch import Tensor


def reverse_channels(data: Any) -> Any:
    """Reverses the three channels of images.

    mmengine takes the channels by `image[[2, 1, 0]]`. For that PyTorch copies the list to the
    device and waits until the device is done with all that it was given before, which at this
    point of a training step is the backward pass of the step before.

    Args:
        data: An image (C, H, W), a batch (B, C, H, W), or a sequence of such; of other channels
            than three they stay as they are.
    """
    if isinstance(data, Tensor):
        return data.flip(-3) if data.ndim > 2 and data.shape[-3] == 3 else data
    return [reverse_channels(image) for image in data]
