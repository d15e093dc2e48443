"""Losses that are logged without waiting for the backward pass."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from mmvig.engine.backbones import unwrap


@HOOKS.register_module()
class EarlyLossHook(Hook):
    """Has the losses of a step on the host when its forward pass is done on the device.

    mmengine reads each loss at the end of the step, and so waits there for the backward pass and
    the optimizer. With this hook the host prepares the next step meanwhile. The values are the
    same, as float32 on the CPU; the losses of the backward pass are not touched.

    In a config: `default_hooks = dict(early_losses=dict(type='EarlyLossHook'))`.
    """

    priority = 'HIGHEST'  # before those that read the losses

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def before_train(self, runner: Runner) -> None:
        """Wraps the model's `parse_losses`, which ends a forward pass."""
        model = unwrap(runner.model)
        parse = model.parse_losses

        def parse_and_copy(losses: dict) -> tuple[Tensor, dict[str, Tensor]]:
            loss, log_vars = parse(losses)
            self._copy(log_vars)
            return loss, log_vars

        model.parse_losses = parse_and_copy

    def after_train(self, runner: Runner) -> None:
        """Gives the model its own `parse_losses` back."""
        vars(unwrap(runner.model)).pop('parse_losses', None)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Replaces the losses, on the device, by their copies."""
        if outputs is None or self._values is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        values = dict(zip(self._names, self._values.unbind(), strict=True))
        outputs.update((name, values[name]) for name in outputs if name in values)

    def _copy(self, log_vars: dict[str, Tensor]) -> None:
        """Starts the copy to page-locked memory."""
        self._names = list(log_vars)
        values = torch.stack([value.detach().float() for value in log_vars.values()])
        self._values = values.to('cpu', non_blocking=True)
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
