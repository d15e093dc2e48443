"""Matrix products whose results are wider than what they multiply."""

import torch
from torch import Tensor

# whether mm can return float32 for products of half precision (PyTorch 2.8)
WIDE_RESULTS = hasattr(torch.ops.aten.mm, 'dtype')


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, (M, K) and (K, N) of one dtype, as (M, N) in that dtype or a wider one."""
    if WIDE_RESULTS and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
