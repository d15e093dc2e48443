"""Running models: the optimizer and its constructor, checks, compilation and CUDA graphs."""

from mmvig.engine.acceleration import CompileBackboneHook, CudaGraphHook
from mmvig.engine.backbones import compile_backbone, find_backbone
from mmvig.engine.channels import check_channels
from mmvig.engine.cuda_graphs import CudaGraphs, use_cuda_graphs
from mmvig.engine.early_losses import EarlyLossHook
from mmvig.engine.fused_adamw import FusedAdamW
from mmvig.engine.layer_decay import LayerDecayOptimWrapperConstructor

__all__ = [
    'CompileBackboneHook',
    'CudaGraphHook',
    'CudaGraphs',
    'EarlyLossHook',
    'FusedAdamW',
    'LayerDecayOptimWrapperConstructor',
    'check_channels',
    'compile_backbone',
    'find_backbone',
    'use_cuda_graphs',
]
