"""Puts the weights of a checkpoint file into a backbone."""

from collections.abc import Mapping

from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmvig.checkpoint.arch import guess_arch
from mmvig.checkpoint.fitting import Fitted, first, fit_state_dict
from mmvig.checkpoint.reading import find_state_dict, read_checkpoint

INIT_CFG_KEYS = {'type', 'checkpoint', 'prefix'}


def init_pretrained(backbone: nn.Module) -> bool:
    """Loads the checkpoint that `backbone.init_cfg` names; says whether it names one.

    Raises:
        ValueError: If `init_cfg` is the name of a file, or the file cannot be read or does not fit.
        FileNotFoundError: If there is no such file.
    """
    cfg = backbone.init_cfg
    if isinstance(cfg, str):
        raise ValueError(
            f"init_cfg must be dict(type='Pretrained', checkpoint={cfg!r}), got the file alone"
        )
    if not isinstance(cfg, Mapping) or cfg.get('type') != 'Pretrained':
        return False
    if unknown := set(cfg) - INIT_CFG_KEYS:
        raise ValueError(
            f'init_cfg has unknown keys {sorted(unknown)}; it takes {sorted(INIT_CFG_KEYS)}'
        )
    load_pretrained(backbone, cfg['checkpoint'], prefix=cfg.get('prefix', ''))
    backbone._is_init = True
    return True


def load_pretrained(backbone: nn.Module, filename: str, prefix: str = '') -> None:
    """Loads a checkpoint file into a backbone, strictly.

    Args:
        backbone: `ViG`, `ViGH`, `TimmViT`, or `ViTAdapter` around a trunk.
        filename: Path or URL. Bare state dict, or a training checkpoint that holds one.
        prefix: As of `find_state_dict`.

    Raises:
        ValueError: If the file cannot be read, does not fit, or holds NaN or infinity; names the
            first offending keys, and the network that the file is of.
        FileNotFoundError: If there is no such file.
    """
    state_dict = find_state_dict(read_checkpoint(filename), filename, prefix)
    fitted = load_weights(backbone, state_dict, filename)
    own = _shapes(backbone.state_dict())
    left_out = f' ({first(fitted.left_out)})' if fitted.left_out else ''
    MMLogger.get_current_instance().info(
        f'{filename}: loaded {len(fitted.tensors)} tensors into {_name(own, backbone)}, '
        f'{len(fitted.resized)} of them resized; left out {len(fitted.left_out)}{left_out}; '
        f'{len(own) - len(fitted.tensors)} stay as initialised'
    )


def load_weights(
    backbone: nn.Module, state_dict: Mapping[str, Tensor], source: str = 'state dict'
) -> Fitted:
    """Loads a state dict, official or ours, into a backbone, strictly.

    Args:
        backbone: `ViG`, `ViGH`, `TimmViT`, or `ViTAdapter` around a trunk.
        state_dict: Tensors by name.
        source: Where they come from, for the messages.

    Returns:
        What was loaded, resized and left out.

    Raises:
        ValueError: If it does not fit, or holds NaN or infinity.
    """
    own = backbone.state_dict()
    shapes = _shapes(own)
    try:
        fitted = fit_state_dict(state_dict, shapes)
    except ValueError as error:
        wanted = _name(shapes, backbone)
        found = str(guess_arch(_shapes(state_dict)) or 'none of the networks here')
        fits = wanted in (found, f'{found} in ViTAdapter')  # a file of the trunk alone will do
        guess = 'all else fits' if fits else f'it looks like {found}'
        raise ValueError(f'{source} does not fit {wanted}: {error}; {guess}') from None
    if broken := [k for k, v in fitted.tensors.items() if not v.isfinite().all()]:
        raise ValueError(f'{source} holds NaN or infinity: {first(broken)}')
    backbone.load_state_dict({**own, **fitted.tensors})
    return fitted


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def _name(shapes: Mapping[str, tuple[int, ...]], backbone: nn.Module) -> str:
    return str(guess_arch(shapes) or type(backbone).__name__)
