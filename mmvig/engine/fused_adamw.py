"""AdamW with many parameter groups, and little for the host to do."""

import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor

# torch's step without the hooks around it, which surround the one below
_USUAL_STEP = inspect.unwrap(torch.optim.Adam.step)
_OTHER_KINDS = ('amsgrad', 'maximize', 'capturable', 'differentiable')


class _Lists(NamedTuple):
    """A group's parameters that have been updated before, and their states."""

    group: dict
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


@OPTIMIZERS.register_module()
class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, bit for bit, with lists of tensors that are kept.

    torch collects and sorts parameters and states anew in every step. With layer-wise learning
    rates, 28 groups in ViG, that takes the host longer than all launches.

    In a config: `optim_wrapper = dict(optimizer=dict(type='FusedAdamW', lr=1e-4), ...)`. Takes up
    checkpoints of AdamW, and AdamW its.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decays of the two running means, of the gradient and its square.
        eps: Added to the root of the latter.
        weight_decay: Share of the parameters, times lr, that each step takes away.
        fused: True, so that settings of an AdamW serve that has it.

    Raises:
        ValueError: If it is not to be fused.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = True,
    ) -> None:
        if fused is not True:
            raise ValueError(f'FusedAdamW is fused, got fused={fused}: use AdamW')
        self._lists: list[_Lists] | None = None
        self._without_state: list[Tensor] = []
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)

    def add_param_group(self, param_group: dict) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._lists = None

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; the groups stay fused where those of an AdamW were not.

        Raises:
            ValueError: For states of an AdamW with `amsgrad`, which has one more.
        """
        groups = state_dict['param_groups']
        if any(group.get('amsgrad') for group in groups):
            raise ValueError('these states are of an AdamW with amsgrad=True: use AdamW')
        groups = [{**group, 'fused': True, 'foreach': None} for group in groups]
        super().load_state_dict({**state_dict, 'param_groups': groups})

    def __setstate__(self, state: dict) -> None:
        """Called by `load_state_dict`, which puts new states in place of the old ones."""
        super().__setstate__(state)
        self._lists = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates all parameters that have a gradient."""
        grads = self._grads() if closure is None else None
        if grads is None:
            self._lists = None
            return _USUAL_STEP(self, closure)
        torch._foreach_add_([step for lists in self._lists for step in lists.steps], 1)
        for (group, params, exp_avgs, exp_avg_sqs, steps), of_group in zip(
            self._lists, grads, strict=True
        ):
            beta1, beta2 = group['betas']
            torch._fused_adamw_(
                params, of_group, exp_avgs, exp_avg_sqs, [], steps,
                lr=group['lr'], beta1=beta1, beta2=beta2, weight_decay=group['weight_decay'],
                eps=group['eps'], amsgrad=False, maximize=False,
            )  # fmt: skip
        return None

    def _grads(self) -> list[list[Tensor]] | None:
        """Gradients by group, as the lists have the parameters; None where lists do not serve."""
        scales = (getattr(self, name, None) for name in ('grad_scale', 'found_inf'))
        if any(scale is not None for scale in scales) or not self._collect():
            return None
        if any(p.grad is not None for p in self._without_state):
            return None
        grads = [[p.grad for p in lists.params] for lists in self._lists]
        return None if any(g is None for of_group in grads for g in of_group) else grads

    def _collect(self) -> bool:
        """Makes the lists, if there are none; whether there are any."""
        if self._lists is not None:
            return True
        found, without = [], []
        for group in self.param_groups:
            params = [p for p in group['params'] if self.state.get(p)]
            without += [p for p in group['params'] if not self.state.get(p)]
            fused = group['fused'] and not any(group[kind] for kind in _OTHER_KINDS)
            kinds = {(p.device, p.dtype) for p in params}
            if not fused or isinstance(group['lr'], Tensor) or len(kinds) > 1:
                return False
            if params:
                states = [self.state[p] for p in params]
                names = ('exp_avg', 'exp_avg_sq', 'step')
                found.append(_Lists(group, params, *([s[n] for s in states] for n in names)))
        self._lists, self._without_state = found, without
        return bool(found)
