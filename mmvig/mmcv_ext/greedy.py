"""Greedy suppression, given who suppresses whom."""

import numpy as np
import torch
from torch import Tensor


def greedy_keep(suppresses: Tensor) -> Tensor:
    """Keeps the best row that is left, drops what it suppresses, and so on.

    Args:
        suppresses: (N, N), bool, rows and columns best first; the lower half does not matter.

    Returns:
        Positions of the kept rows, best first, int64, on the same device.
    """
    rows = suppresses.cpu().numpy()
    alive = np.ones(len(rows), dtype=bool)
    kept = []
    for position in range(len(rows)):
        if alive[position]:
            kept.append(position)
            alive &= ~rows[position]
    return torch.tensor(kept, dtype=torch.long, device=suppresses.device)
