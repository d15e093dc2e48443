"""Layer-wise learning-rate decay for every backbone that knows the depth of its parameters."""

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

# embeddings are not shrunk towards zero, as in ViT-Adapter's, BEiT's and MAE's recipes
NO_DECAY_NAMES = ('pos_embed', 'level_embed')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """One parameter group per layer and kind: rate `lr * decay_rate ** (num_layers - 1 - layer)`.

    The layer comes from the backbone's `get_layer_depth(name, prefix) -> (layer, num_layers)`, as
    in mmpretrain; whatever is outside the backbone learns at the full rate. Vectors, biases and
    the position and level embeddings have no weight decay.

    In a config: `optim_wrapper = dict(constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.85), ...)`.

    Raises:
        ValueError: For other keys in `paramwise_cfg`, a rate out of (0, 1], or a model whose
            backbone has no `get_layer_depth`.
    """

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Fills `params` with the groups of `module`; called once, with the whole model."""
        rate = self._layer_decay_rate()
        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise ValueError(
                f'{type(self).__name__} needs a model whose backbone has get_layer_depth(), got '
                f'{type(module).__name__} with backbone {type(backbone).__name__}'
            )
        groups: dict[tuple[int, bool], dict] = {}
        num_layers = backbone.get_layer_depth('', '')[1]
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            layer = num_layers - 1
            if name.startswith('backbone.'):
                layer = backbone.get_layer_depth(name, 'backbone.')[0]
            decays = param.dim() > 1 and not name.endswith(NO_DECAY_NAMES)
            scale = rate ** (num_layers - 1 - layer)
            group = groups.setdefault(
                (layer, decays),
                dict(
                    params=[],
                    param_names=[],
                    lr=self.base_lr * scale,
                    lr_scale=scale,
                    weight_decay=self.base_wd if decays else 0.0,
                    group_name=f'layer_{layer}_{"decay" if decays else "no_decay"}',
                ),
            )
            group['params'].append(param)
            group['param_names'].append(name)
        params.extend(groups[key] for key in sorted(groups))
        scales = ', '.join(f'{g["group_name"]}: {g["lr_scale"]:.3g}' for g in params)
        print_log(f'learning rates by layer, as a share of {self.base_lr}: {scales}', 'current')

    def _layer_decay_rate(self) -> float:
        if set(self.paramwise_cfg) != {'layer_decay_rate'}:
            raise ValueError(
                f'{type(self).__name__} takes paramwise_cfg=dict(layer_decay_rate=...), got the '
                f'keys {sorted(self.paramwise_cfg)}'
            )
        rate = self.paramwise_cfg['layer_decay_rate']
        if not 0 < rate <= 1:
            raise ValueError(f'layer_decay_rate must be above 0 and at most 1, got {rate}')
        return rate
