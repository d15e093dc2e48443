"""What stands in for an operator that the stand-in does not have."""

from collections.abc import Callable
from typing import NoReturn


def missing_op(name: str) -> Callable[..., NoReturn]:
    """Module-level `__getattr__` of the stand-in: a placeholder that raises when called.

    mmcv looks every operator up while `mmcv.ops` is imported, so the look-up itself must succeed.

    Raises:
        AttributeError: For private and dunder names, which Python and its tools probe for.
    """
    if name.startswith('_'):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def placeholder(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f'mmcv operator {name!r} needs compiled code, and this mmcv has none. Install '
            'onedl-mmcv built with its operators, or the OpenMMLab mmcv wheel for your PyTorch '
            'and CUDA; mmvig then steps aside.'
        )

    placeholder.__name__ = placeholder.__qualname__ = name
    return placeholder
