"""Instance masks of one bit a pixel, which travel and are copied cheaply.

At 1333 x 800 pixels mmdet's bitmaps take 1 MiB an object. Between the loader's processes they
are pickled, padded on the host, copied with the batch and fetched by the step: of a training step
of Mask R-CNN these were 35 ms.
"""

from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from torch import Tensor

# Pixels of bitmaps unpacked at a time: 128 MiB in float32.
_CHUNK_ELEMENTS = 1 << 25
# Pixels; RoIAlign is 0 for a region this far outside of a map.
_OUTSIDE = -1e4


class PackedMasks:
    """Masks (N, H, W) of one bit a pixel, eight in a byte; immutable.

    They take the place of mmdet's `BitmapMasks` between the pipeline and the losses.

    Args:
        bits: (N, h, ceil(w / 8)), uint8, as `numpy.packbits` makes them along the rows.
        height, width: H and W, at least h and w: the rest is empty.

    Raises:
        ValueError: If the bits do not fit into the size.
    """

    def __init__(self, bits: Tensor, height: int, width: int) -> None:
        if bits.dim() != 3 or bits.shape[1] > height or 8 * (bits.shape[2] - 1) >= width:
            raise ValueError(f'bits {tuple(bits.shape)} do not fit into masks {height}x{width}')
        self.bits, self.height, self.width = bits, height, width

    @classmethod
    def pack(cls, masks: np.ndarray) -> 'PackedMasks':
        """Packs bitmaps (N, H, W); everything but 0 belongs to the object."""
        bits = np.packbits(masks != 0, axis=2)
        return cls(torch.from_numpy(bits), *masks.shape[1:])

    def __len__(self) -> int:
        return len(self.bits)

    def __getattr__(self, name: str) -> Any:
        """Called for what mmdet's bitmaps have and these do not, such as `rescale` and `flip`."""
        raise AttributeError(
            f'packed masks have no {name!r}: put PackMasks behind all transforms of images, right '
            'before PackDetInputs'
        )

    def __getitem__(self, index: Any) -> 'PackedMasks':
        """Some of the masks: a slice, or a list, array or tensor of positions or flags."""
        return PackedMasks(self.bits[index], self.height, self.width)

    def __deepcopy__(self, memo: dict) -> 'PackedMasks':
        """Itself: mmdet copies the samples of a batch in every step, only to change labels."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> 'PackedMasks':
        """On another device; arguments as of `Tensor.to`."""
        return PackedMasks(self.bits.to(*args, **kwargs), self.height, self.width)

    def pad(self, out_shape: tuple[int, int], pad_val: int = 0) -> 'PackedMasks':
        """Padded at the bottom and on the right to (H, W), without touching the bits.

        Raises:
            ValueError: If something else than 0 is to be padded.
        """
        if pad_val != 0:
            raise ValueError(f'packed masks are padded with 0, got pad_val={pad_val}')
        return PackedMasks(self.bits, *out_shape)

    def to_tensor(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """The bitmaps (N, H, W), 0 and 1."""
        bits = self.bits.to(device)
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
        flat = (bits[..., None] >> shifts & 1).flatten(2)[..., : self.width]
        masks = torch.zeros(len(self), self.height, self.width, dtype=dtype, device=device)
        masks[:, : flat.shape[1], : flat.shape[2]] = flat
        return masks

    def crop(self, boxes: Tensor, owners: Tensor, size: tuple[int, int]) -> Tensor:
        """Cuts masks to boxes and resizes them by RoIAlign (arXiv 1703.06870, section 3.1).

        Args:
            boxes: (R, 4), x1, y1, x2, y2 in pixels, on the device to compute on; what lies
                outside of the masks is cut off.
            owners: (R,), int64, the mask of each box.
            size: h, w of the results.

        Returns:
            (R, h, w), float32, how much of each bin is covered.
        """
        from mmcv.ops import roi_align  # loads all of mmcv's operators

        limits = (self.width, self.height) * 2
        sides = zip(boxes.float().unbind(1), limits, strict=True)
        boxes = torch.stack([side.clamp(0, limit) for side, limit in sides], 1)
        covered = boxes.new_zeros(len(boxes), *size)
        step = max(1, _CHUNK_ELEMENTS // (self.height * self.width))
        for start in range(0, len(self), step):
            bitmaps = self[start : start + step].to_tensor(torch.float32, boxes.device)
            position = owners - start
            here = ((position >= 0) & (position < len(bitmaps)))[:, None]
            position = position.clamp(0, len(bitmaps) - 1)[:, None].to(boxes.dtype)
            regions = torch.cat([position, torch.where(here, boxes, _OUTSIDE)], 1)
            # Arguments by position: the operator is an autograd function.
            covered += roi_align(bitmaps[:, None], regions, size, 1.0, 0, 'avg', True)[:, 0]
        return covered

    def crop_and_resize(
        self,
        bboxes: np.ndarray,
        out_shape: tuple[int, int],
        inds: np.ndarray,
        device: torch.device | str = 'cpu',
        interpolation: str = 'bilinear',
        binarize: bool = True,
    ) -> Any:
        """`crop` with the arguments and results of mmdet's `BitmapMasks`, for its own heads."""
        from mmdet.structures.mask import BitmapMasks

        boxes, owners = (torch.as_tensor(a, device=device) for a in (bboxes, inds))
        covered = self.crop(boxes, owners, out_shape)
        return BitmapMasks((covered >= 0.5 if binarize else covered).cpu().numpy(), *out_shape)

    def to_ndarray(self) -> np.ndarray:
        """The bitmaps (N, H, W) as NumPy's uint8."""
        return self.to_tensor(torch.uint8, 'cpu').numpy()


@TRANSFORMS.register_module()
class PackMasks(BaseTransform):
    """Packs `gt_masks`, mmdet's `BitmapMasks`; the last step before `PackDetInputs`."""

    def transform(self, results: dict) -> dict:
        """Replaces the masks of one image."""
        results['gt_masks'] = PackedMasks.pack(results['gt_masks'].masks)
        return results
