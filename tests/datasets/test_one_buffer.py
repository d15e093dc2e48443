"""Batches as one buffer: equal to mmengine's through a loader's processes, pinned or not."""

import mmap
import pickle
import sys

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import FUNCTIONS
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmvig.datasets import PackedMasks, one_buffer, one_buffer_collate
from mmvig.datasets.one_buffer import OneBufferBatch, _give_pages_back


class Samples(Dataset):
    """What a detection pipeline gives: images of several sizes, objects, one sample with none."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        count, width = index % 3, 21 + index
        masks = torch.rand(count, 16, width, generator=generator) > 0.5
        truths = InstanceData(
            bboxes=torch.rand(count, 4, generator=generator),
            labels=torch.arange(count),
            masks=PackedMasks.pack(masks.numpy()),
        )
        sample = BaseDataElement(metainfo=dict(img_id=index, scale=(1.5, 2.0)))
        sample.gt_instances = truths
        image = torch.randint(256, (3, 16, width), dtype=torch.uint8, generator=generator)
        return dict(inputs=image, data_samples=sample, where=np.arange(index))


def flat(batch: dict) -> list[Tensor]:
    """All tensors of a batch."""
    truths = [sample.gt_instances for sample in batch['data_samples']]
    parts = [(t.bboxes, t.labels, t.masks.bits) for t in truths]
    return [*batch['inputs'], *(tensor for part in parts for tensor in part)]


def check(batch: dict, expected: dict) -> None:
    assert list(batch) == list(expected)
    for got, wanted in zip(flat(batch), flat(expected), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    for got, wanted in zip(batch['data_samples'], expected['data_samples'], strict=True):
        assert got.metainfo == wanted.metainfo
        assert got.gt_instances.masks.width == wanted.gt_instances.masks.width
    for got, wanted in zip(batch['where'], expected['where'], strict=True):
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_loader_gives_the_same_batches(workers: int) -> None:
    loaders = [
        DataLoader(Samples(), 2, num_workers=workers, collate_fn=collate)
        for collate in (one_buffer_collate, pseudo_collate)
    ]
    for batch, expected in zip(*loaders, strict=True):
        assert isinstance(batch, OneBufferBatch) == (workers > 0)
        check(batch, expected)


def test_a_batch_is_pickled_as_one_tensor_and_pinned_by_one_copy(monkeypatch) -> None:
    expected = pseudo_collate([Samples()[2], Samples()[3]])
    batch = pickle.loads(pickle.dumps(OneBufferBatch(expected)))
    assert len({t.untyped_storage().data_ptr() for t in flat(batch)}) == 1
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, 'pin_memory', pin)
    before = {id(t) for t in flat(batch)}
    result = batch.pin_memory()
    assert type(result) is dict
    check(result, expected)
    (buffer,) = pinned
    assert {t.untyped_storage().data_ptr() for t in flat(result)} == {buffer.data_ptr()}
    assert {id(t) for t in flat(result)} == before


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux alone can give pages back')
def test_pages_of_shared_memory_alone_are_given_back() -> None:
    shared, own = (torch.full((1 << 20,), 7, dtype=torch.uint8) for _ in range(2))
    shared.share_memory_()
    page = own[-own.data_ptr() % mmap.PAGESIZE :]
    for buffer in (shared, own, page):
        _give_pages_back(buffer)
    assert not shared.any()
    assert (own == 7).all()


class Shape:
    """Keeps a part of a tensor that it is made of."""

    def __init__(self, whole: Tensor) -> None:
        self.part = whole[1:]

    def __reduce__(self) -> tuple:
        return Shape, (torch.cat([self.part[:1], self.part]),)


@pytest.mark.parametrize('aliased', [True, False])
def test_memory_that_something_else_reads_is_kept(aliased: bool, monkeypatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(one_buffer, '_give_pages_back', lambda buffer: given.append(len(buffer)))
    monkeypatch.setattr(Tensor, 'pin_memory', Tensor.clone)
    data = dict(inputs=[torch.arange(9)], shape=Shape(torch.arange(4)) if aliased else None)
    batch = pickle.loads(pickle.dumps(OneBufferBatch(data))).pin_memory()
    assert torch.equal(batch['inputs'][0], torch.arange(9))
    assert len(given) == (0 if aliased else 1)
    if aliased:
        assert torch.equal(batch['shape'].part, torch.arange(1, 4))


def test_a_batch_that_never_left_its_process_is_pinned_as_it_is() -> None:
    expected = pseudo_collate([Samples()[2]])
    check(OneBufferBatch(expected).pin_memory(), expected)


def test_tensors_keep_dtype_and_shape() -> None:
    tensors = [
        torch.tensor(3.5, dtype=torch.float64),
        torch.rand(6, 4)[::2, 1:],
        torch.tensor([True, False]),
        torch.rand(3, 0, 2),
        torch.rand(5).to(torch.bfloat16),
        torch.arange(6).view(2, 3).t(),
    ]
    got = pickle.loads(pickle.dumps(OneBufferBatch(dict(inputs=tensors))))['inputs']
    for tensor, wanted in zip(got, tensors, strict=True):
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
        assert tensor.is_contiguous() and torch.equal(tensor, wanted)


def test_configs_find_it_by_name() -> None:
    assert FUNCTIONS.get('one_buffer_collate') is one_buffer_collate


@pytest.mark.gpu
def test_a_loader_pins_them() -> None:
    loaders = [
        DataLoader(Samples(), 2, num_workers=1, pin_memory=True, collate_fn=one_buffer_collate),
        DataLoader(Samples(), 2, collate_fn=pseudo_collate),
    ]
    for batch, expected in zip(*loaders, strict=True):
        check(batch, expected)
        assert all(t.is_pinned() for t in flat(batch) if t.numel())
