"""mmseg's data preprocessor; it does not wait for the device."""

from collections.abc import Mapping
from typing import Any

from mmseg.models import SegDataPreProcessor

from mmvig.models.data_preprocessors.channels import reverse_channels


class AsyncSegDataPreProcessor(SegDataPreProcessor):
    """mmseg's `SegDataPreProcessor`, with which the next step begins while this one is at work.

    Takes its arguments; images are the same to the bit.

    Args:
        *args, **kwargs: As mmseg's.
        non_blocking: Whether batches are copied without waiting, for which the loader should have
            `pin_memory=True`.
    """

    def __init__(self, *args: Any, non_blocking: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._non_blocking = non_blocking  # mmseg's takes no such argument
        self._reverses, self._channel_conversion = self._channel_conversion, False

    def cast_data(self, data: Any) -> Any:
        """Moves a batch to the device, where its channels are reversed."""
        data = super().cast_data(data)
        if self._reverses and isinstance(data, Mapping) and 'inputs' in data:
            data = {**data, 'inputs': reverse_channels(data['inputs'])}
        return data
