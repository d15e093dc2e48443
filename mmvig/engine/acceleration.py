"""Hooks that make the backbone of a training or test run faster."""

import logging

import torch
from mmengine.dist import is_distributed
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmvig.engine.backbones import compile_backbone, find_backbone
from mmvig.engine.cuda_graphs import use_cuda_graphs


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compiles the backbone, and leaves neck, heads and losses as they are.

    mmengine's own `compile=` in a config compiles whole steps of detectors, which break into many
    graphs and are compiled anew at each number of boxes. Checkpoints are the same with and without.

    In a config: `custom_hooks = [dict(type='CompileBackboneHook')]`.

    Args:
        mode, dynamic, backend: As of `compile_backbone`.
    """

    def __init__(
        self, mode: str = 'default', dynamic: bool | None = None, backend: str = 'inductor'
    ) -> None:
        self.settings = dict(mode=mode, dynamic=dynamic, backend=backend)

    def before_run(self, runner: Runner) -> None:
        """Compiles at the next call of the backbone."""
        compile_backbone(find_backbone(runner.model), **self.settings)


@HOOKS.register_module()
class CudaGraphHook(Hook):
    """Replays CUDA graphs of the backbone in validation and test, and on request in training.

    In a config: `custom_hooks = [dict(type='CudaGraphHook')]`.

    Args:
        max_graphs: Input sizes whose graphs are kept; see `CudaGraphs`.
        training: Whether training steps are recorded, too.
        direct_gradients: As of `CudaGraphs`; None is True where there is one process. False for
            models that call `torch.autograd.grad` with the backbone's weights.
    """

    priority = 'LOW'  # after CompileBackboneHook, whose result is recorded

    def __init__(
        self, max_graphs: int = 16, training: bool = False, direct_gradients: bool | None = None
    ) -> None:
        self.max_graphs, self.training = max_graphs, training
        self.direct_gradients = direct_gradients

    def before_run(self, runner: Runner) -> None:
        """Records at the second call with each size; says so where there is no GPU to do that."""
        if not torch.cuda.is_available():
            print_log(
                'CUDA graphs (--cuda-graph, CudaGraphHook) have no effect: PyTorch finds no GPU',
                logger='current',
                level=logging.WARNING,
            )
        direct = self.direct_gradients
        direct = not is_distributed() if direct is None else direct
        use_cuda_graphs(find_backbone(runner.model), self.max_graphs, self.training, direct)
