"""Batches that travel between processes as one tensor.

A batch of two samples of Mask R-CNN has ten tensors, and each that a loader's process hands over
costs the training process a connection, a file and a mapping, while its thread that pins batches
holds the interpreter. Together they are one, small tensors are pinned with the large ones, and
the training step waits for neither.
"""

import ctypes
import io
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import FUNCTIONS
from torch import Tensor
from torch.utils.data import get_worker_info

_ALIGNMENT = 64  # bytes; a view of the buffer starts at a multiple of its dtype's size
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None
_MADV_REMOVE = 9  # of Linux: gives the pages of shared memory back
# Where a tensor lies: first byte, dtype, shape.
Place = tuple[int, torch.dtype, tuple[int, ...]]


@FUNCTIONS.register_module()
def one_buffer_collate(samples: Sequence[dict]) -> dict:
    """mmengine's `pseudo_collate`, whose batch leaves a loader's process as one tensor.

    In a config: `train_dataloader = dict(collate_fn=dict(type='one_buffer_collate'), ...)`.

    Args:
        samples: Dicts with the same keys.

    Returns:
        The lists of their values by key; the tensors in them are equal to the samples', contiguous.
    """
    batch = pseudo_collate(samples)
    return batch if get_worker_info() is None else OneBufferBatch(batch)


class OneBufferBatch(dict):
    """A batch that is pickled as one buffer, and pinned as one by a `DataLoader`.

    Args:
        data: The batch.
        views: The tensors in it that lie in the buffer, and the byte where each starts.
        buffer: (n,), uint8; None before the batch has been pickled.
    """

    def __init__(
        self, data: dict, views: Sequence[tuple[Tensor, int]] = (), buffer: Tensor | None = None
    ) -> None:
        super().__init__(data)
        self._views, self._buffer = views, buffer

    def __reduce__(self) -> tuple:
        packer = _Packer()
        skeleton = packer.pack(dict(self))
        return _unpack, (skeleton, packer.places, packer.buffer())

    def pin_memory(self) -> dict:
        """The batch in page-locked memory; called by `DataLoader(pin_memory=True)`."""
        if self._buffer is not None:
            pinned = self._buffer.pin_memory().untyped_storage()
            for view, start in self._views:
                view.set_(pinned, start // view.itemsize, view.shape)
            if _is_alone(self._buffer):
                _give_pages_back(self._buffer)
        return dict(self)


def _is_alone(buffer: Tensor) -> bool:
    """Whether no other tensor reads the buffer's memory."""
    count = getattr(torch._C, '_storage_Use_Count', None)
    storage = buffer.untyped_storage()  # the second that holds it
    return count is not None and count(storage._cdata) == 2


def _give_pages_back(buffer: Tensor) -> None:
    """Frees the shared memory under a buffer that nothing reads any more; it reads as zeros then.

    It would be freed anyway, but in milliseconds in which Python holds the interpreter. Where that
    cannot be done, as for memory that is not shared or does not begin with a page, nothing is.
    """
    if _LIBC is not None:
        address, size = ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(buffer.numel())
        _LIBC.madvise(address, size, _MADV_REMOVE)


class _Packer(pickle.Pickler):
    """Pickles all but the tensors, and notes those."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, pickle.HIGHEST_PROTOCOL)
        self.places: list[Place] = []
        self._tensors: list[Tensor] = []
        self._end = 0

    def pack(self, data: dict) -> bytes:
        self.dump(data)
        return self._file.getvalue()

    def persistent_id(self, obj: Any) -> int | None:
        """The position of a tensor among them; nothing for all else."""
        if type(obj) is not Tensor or obj.layout != torch.strided or obj.requires_grad:
            return None
        self.places.append((self._end, obj.dtype, tuple(obj.shape)))
        self._tensors.append(obj)
        self._end += -(-obj.numel() * obj.itemsize // _ALIGNMENT) * _ALIGNMENT
        return len(self.places) - 1

    def buffer(self) -> Tensor:
        buffer = torch.empty(self._end, dtype=torch.uint8)
        for tensor, (start, dtype, shape) in zip(self._tensors, self.places, strict=True):
            _view(buffer, start, dtype, shape).copy_(tensor)
        return buffer


def _view(buffer: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    view = torch.empty(0, dtype=dtype)
    return view.set_(buffer.untyped_storage(), start // dtype.itemsize, shape)


def _unpack(skeleton: bytes, places: list[Place], buffer: Tensor) -> OneBufferBatch:
    tensors = [_view(buffer, *place) for place in places]
    starts = [start for start, *_ in places]
    data = _Unpacker(skeleton, tensors).load()
    return OneBufferBatch(data, list(zip(tensors, starts, strict=True)), buffer)


class _Unpacker(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, skeleton: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
