"""A network in one of four forms, forward or training step, on one batch: what is measured."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmvig.engine import compile_backbone, use_cuda_graphs

FORMS = ('eager', 'compiled', 'graph', 'compiled+graph')
STEPS = ('forward', 'training')
PRECISIONS = ('autocast', 'bfloat16', 'float32')


@dataclass(frozen=True)
class Case:
    """What is run: forward, in evaluation mode, or forward and backward, in training mode.

    Precision 'autocast' is bfloat16 autocast over float32 weights, 'bfloat16' has the weights in
    it, too. CUDA graphs are those of `use_cuda_graphs`; of a compiled training step, those of
    torch.compile. Backward passes run in the calling thread, as in `tools/train.py`.
    """

    height: int
    width: int
    batch: int
    step: str
    form: str
    precision: str

    @property
    def training(self) -> bool:
        """Whether there is a backward pass."""
        return self.step == 'training'

    def autocast(self, device: str) -> AbstractContextManager:
        """The context that the network runs in."""
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == 'autocast')

    def images(self, device: str, batch: int | None = None) -> Tensor:
        """Random images, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch or self.batch, 3, self.height, self.width)
        images = torch.randn(shape, generator=generator).to(device)
        return images.bfloat16() if self.precision == 'bfloat16' else images


def make_step(module: nn.Module, case: Case, images: Tensor, whole: bool) -> Callable[[], tuple]:
    """A function that runs the case once and returns the outputs.

    Args:
        module: The network, on the device of the images, in eager form; it is changed.
        case: What to run.
        images: The batch.
        whole: Whether compilation must make a single graph of the network.
    """
    module.train(case.training)
    if case.precision == 'bfloat16':
        module.bfloat16()
    if case.form.startswith('compiled'):
        records = case.training and case.form == 'compiled+graph'
        mode = 'reduce-overhead' if records else 'default'
        if whole:
            compile_backbone(module, mode=mode)
        else:
            module.compile(mode=None if mode == 'default' else mode)
    if case.form == 'graph' or (case.form.endswith('graph') and not case.training):
        use_cuda_graphs(module, training=case.training)
    make = _training if case.training else _forward
    return make(module, case, images)


def _forward(module: nn.Module, case: Case, images: Tensor) -> Callable[[], tuple]:
    def step() -> tuple:
        with torch.no_grad(), case.autocast(images.device.type):
            return tuple(module(images))

    return step


def _training(module: nn.Module, case: Case, images: Tensor) -> Callable[[], tuple]:
    """Forward and backward from fixed gradients of the outputs, as heads would send them."""
    grads: list[Tensor] = []

    def step() -> tuple:
        torch.compiler.cudagraph_mark_step_begin()
        module.zero_grad(set_to_none=True)
        with case.autocast(images.device.type):
            outs = tuple(module(images))
        if not grads:
            random = torch.Generator(images.device).manual_seed(1)
            for out in outs:
                grad = torch.randn(out.shape, generator=random, device=out.device)
                grads.append(torch.empty_like(out).copy_(grad / out[0].numel()))
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.backward(outs, grads)
        return outs

    return step
