"""Images to a batch, without work for the host and waits for the device."""

import torch
from mmengine.model import ImgDataPreprocessor
from torch import Tensor

from mmvig.models.data_preprocessors.channels import reverse_channels


class StackingPreprocessor(ImgDataPreprocessor):
    """mmengine's `ImgDataPreprocessor`, its batches the same to the bit, three launches an image.

    Normalizes every image right into its place in the batch, whose size comes from Python's
    integers, where mmengine makes it of small tensors, pads images one by one and copies them
    together; that took the host 5 ms beside a GPU at work (H200, two images).

    Takes its arguments. What is not a list of images of three channels, normalized in float32,
    goes mmengine's way.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        """Images of a batch (C, H_i, W_i) to `inputs` (B, C, H, W), float32, on the device."""
        data = self.cast_data(data)
        images = data['inputs']
        if isinstance(images, Tensor) or not self._normalizes(images):
            return super().forward(data, training)
        if self._channel_conversion:
            images = reverse_channels(images)
        batch = self._empty_batch(images)
        for image, place in zip(images, batch, strict=True):
            place = place[:, : image.shape[1], : image.shape[2]]
            torch.sub(image, self.mean, out=place)
            place.div_(self.std)
        return {'data_samples': None, **data, 'inputs': batch}

    def _normalizes(self, images: list[Tensor]) -> bool:
        if not self._enable_normalize or {self.mean.dtype, self.std.dtype} != {torch.float32}:
            return False  # of whole numbers the means are integers
        return all(
            x.ndim == 3 and x.shape[0] == len(self.mean) == 3 and x.dtype != torch.float64
            for x in images
        )

    def _empty_batch(self, images: list[Tensor]) -> Tensor:
        """Padding alone, as large as the images together, rounded up to the divisor."""
        step = self.pad_size_divisor
        sides = (max(x.shape[i] for x in images) for i in (1, 2))
        height, width = (-(-side // step) * step for side in sides)
        shape = (len(images), images[0].shape[0], height, width)
        return self.mean.new_full(shape, float(self.pad_value))
