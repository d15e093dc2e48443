"""Running models: the optimizer's constructor, compilation and CUDA graphs of backbones."""

from mmvig.engine.acceleration import CompileBackboneHook, CudaGraphHook
from mmvig.engine.backbones import compile_backbone, find_backbone
from mmvig.engine.cuda_graphs import CudaGraphs, use_cuda_graphs
from mmvig.engine.layer_decay import LayerDecayOptimWrapperConstructor

__all__ = [
    'CompileBackboneHook',
    'CudaGraphHook',
    'CudaGraphs',
    'LayerDecayOptimWrapperConstructor',
    'compile_backbone',
    'find_backbone',
    'use_cuda_graphs',
]
