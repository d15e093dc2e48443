"""Packed masks: the bitmaps back, mmdet's crops bit for bit, and their way through a batch."""

import copy

import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS

from mmvig.datasets import PackedMasks

HEIGHT, WIDTH = 37, 53


def bitmaps(count: int) -> np.ndarray:
    """Blobs, touching the border."""
    noise = torch.randn(count, 1, HEIGHT, WIDTH)
    smooth = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)
    return (smooth[:, 0] > 0).numpy().astype(np.uint8)


@pytest.mark.parametrize('count', [0, 1, 5])
def test_bitmaps_come_back_padded(count: int) -> None:
    masks = bitmaps(count)
    packed = PackedMasks.pack(masks)
    assert len(packed) == count and packed.bits.shape == (count, HEIGHT, 7)
    assert np.array_equal(packed.to_ndarray(), masks)
    padded = packed.pad((64, 96))
    assert np.array_equal(padded.to_ndarray(), np.pad(masks, ((0, 0), (0, 27), (0, 43))))
    assert padded.bits is packed.bits


def test_indexing_copying_and_errors() -> None:
    masks = bitmaps(5)
    packed = PackedMasks.pack(masks)
    for index in (slice(1, 3), np.array([4, 0]), [2], torch.tensor([True, False] * 2 + [True])):
        assert np.array_equal(
            packed[index].to_ndarray(),
            masks[np.asarray(index)] if not isinstance(index, slice) else masks[index],
        )
    assert copy.deepcopy(packed) is packed
    assert packed.to('cpu').bits.data_ptr() == packed.bits.data_ptr()
    with pytest.raises(AttributeError, match="no 'rescale': put PackMasks behind"):
        packed.rescale((64, 96))
    with pytest.raises(ValueError, match='pad_val=1'):
        packed.pad((64, 96), pad_val=1)
    with pytest.raises(ValueError, match=r'bits \(5, 37, 7\) do not fit into masks 37x48'):
        packed.pad((37, 48))


@pytest.mark.parametrize('chunk', [1 << 25, 1])
@pytest.mark.parametrize('soft', [True, False])
def test_crops_are_mmdets(soft: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmengine.config import ConfigDict

    structures = pytest.importorskip('mmdet.structures.mask')
    from mmvig.datasets import packed_masks

    monkeypatch.setattr(packed_masks, '_CHUNK_ELEMENTS', chunk)
    masks = bitmaps(5)
    theirs = structures.BitmapMasks(masks, HEIGHT, WIDTH).pad((64, 96))
    ours = PackedMasks.pack(masks).pad((64, 96))
    corner = torch.rand(40, 2) * 60 - 10
    boxes = torch.cat([corner, corner + 1 + torch.rand(40, 2) * 50], 1)  # some beyond the masks
    owners = torch.randint(0, 5, (40,))
    cfg = ConfigDict(mask_size=14, soft_mask_target=soft)
    expected = structures.mask_target([boxes], [owners], [theirs], cfg)
    # Our head's way, and mmdet's own head on packed masks.
    covered = ours.crop(boxes, owners, (14, 14))
    assert torch.equal(covered if soft else (covered >= 0.5).float(), expected)
    assert torch.equal(structures.mask_target([boxes], [owners], [ours], cfg), expected)
    assert 0.2 < expected.mean() < 0.8


def test_transform_and_batch() -> None:
    """Through mmdet's packing, the copy that its detectors make, and its preprocessor."""
    mmdet = pytest.importorskip('mmdet')
    from mmdet.datasets.transforms import PackDetInputs
    from mmdet.models import DetDataPreprocessor
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    assert mmdet
    masks = bitmaps(3)
    results = dict(
        img=np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        gt_masks=BitmapMasks(masks, HEIGHT, WIDTH),
        gt_bboxes=HorizontalBoxes(torch.rand(3, 4)),
        gt_bboxes_labels=np.zeros(3, np.int64),
        gt_ignore_flags=np.array([False, True, False]),
    )
    packed = PackDetInputs(meta_keys=())(TRANSFORMS.build(dict(type='PackMasks'))(results))
    preprocess = DetDataPreprocessor(pad_mask=True, pad_size_divisor=32)
    data = dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']])
    (sample,) = copy.deepcopy(preprocess(data, training=True)['data_samples'])
    expected = np.pad(masks[[0, 2]], ((0, 0), (0, 27), (0, 11)))
    assert np.array_equal(sample.gt_instances.masks.to_ndarray(), expected)
