"""What `mmcv.utils.collect_env` prints about the compiler."""


def get_compiler_version() -> str:
    """Says that nothing was compiled."""
    return 'none: mmvig.mmcv_ext, nothing compiled'


def get_compiling_cuda_version() -> str:
    """mmcv's own answer of a build without CUDA."""
    return 'not available'
