"""Bidirectional gated linear attention: checks and dispatch."""

from torch import Tensor

from mmvig.kernels import bigla_chunked


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_fwd: Tensor,
    log_gate_bwd: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Bidirectional GLA; arguments and result as in `reference.bidirectional_gla`."""
    return bigla_chunked.bidirectional_gla(q, k, v, log_gate_fwd, log_gate_bwd, scale)
