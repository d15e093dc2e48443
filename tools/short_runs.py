"""What the tools that train for some steps only have in common: changes of a config."""

import torch
from mmengine.config import Config, ConfigDict


def innermost_dataset(cfg: Config, stage: str = 'train') -> ConfigDict:
    """The settings of a stage's data inside wrappers such as RepeatDataset."""
    dataset = cfg[f'{stage}_dataloader'].dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def take_bfloat16(cfg: Config) -> None:
    """Mixed precision on a GPU; on a CPU the config stays as it is."""
    if torch.cuda.is_available():
        # bfloat16 has float32's range and needs no loss scale
        cfg.optim_wrapper.update(
            type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(enabled=False)
        )


def leave_no_trace(cfg: Config) -> None:
    """Random weights, no checkpoints, no logs."""
    if cfg.model.backbone.get('init_cfg'):
        cfg.model.backbone.init_cfg = None
    quiet = dict(logger=dict(type='LoggerHook', interval=10**6), checkpoint=None)
    cfg.default_hooks = {**cfg.get('default_hooks', {}), **quiet}
    cfg.log_processor = dict(type='LogProcessor', by_epoch=False)
    cfg.log_level = 'WARNING'
