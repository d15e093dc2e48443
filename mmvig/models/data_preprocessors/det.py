"""mmdet's data preprocessor; it does not wait for the device."""

from typing import Any

from mmdet.models.data_preprocessors import DetDataPreprocessor

from mmvig.models.data_preprocessors.stacking import StackingPreprocessor


class AsyncDetDataPreprocessor(DetDataPreprocessor, StackingPreprocessor):
    """mmdet's `DetDataPreprocessor`, with which the next step begins while this one is at work.

    Takes its arguments; images are the same to the bit. What mmdet's has mmengine's
    `ImgDataPreprocessor` do is done by `StackingPreprocessor`.

    Args:
        *args, **kwargs: As mmdet's.
        non_blocking: Whether batches are copied without waiting, for which the loader should have
            `pin_memory=True`.
    """

    def __init__(self, *args: Any, non_blocking: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, non_blocking=non_blocking, **kwargs)
