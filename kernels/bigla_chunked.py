"""Bidirectional GLA chunk by chunk in plain PyTorch: linear in N, no loop over tokens, any gate.

Shape legend: B batch, N tokens, H heads, K key dim, V value dim, n chunks, C tokens of a chunk.

Only sums of log gates (never differences) are exponentiated, and log gates are at most 0, so no
exponent is positive and nothing overflows, however strong the gates. Two trees make that
possible: inside a chunk, blocks of 1, 2, 4 … tokens are joined pairwise, the decay between two
halves measured to and from their common border; across chunks, states are joined the same way
(Blelloch's scan).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_fwd: Tensor,
    log_gate_bwd: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Same function as `reference.bidirectional_gla`, in time and memory linear in N.

    Computes in float32 (float64 where an input is) also under autocast; any device, differentiable.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] == 0:
        nothing = q.sum() + k.sum() + log_gate_fwd.sum() + log_gate_bwd.sum()
        return (v + nothing).to(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, fwd, bwd = (
            _to_chunks(x.to(dtype)) for x in (q * (scale / 2), k, v, log_gate_fwd, log_gate_bwd)
        )
        out = _scores(q_, k_, fwd, bwd) @ v_ + _from_other_chunks(q_, k_, v_, fwd, bwd)
        return out.flatten(2, 3)[:, :, : q.shape[1]].transpose(1, 2).to(q.dtype)


def _to_chunks(x: Tensor) -> Tensor:
    """(B, N, H, D) to (B, H, n, C, D), padded with zeros: no key, and a gate that keeps."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % CHUNK_SIZE))
    return x.unflatten(2, (-1, CHUNK_SIZE))


def _scores(q: Tensor, k: Tensor, fwd: Tensor, bwd: Tensor) -> Tensor:
    """Attention inside each chunk, both directions: (…, C, K) each to (…, C, C).

    Entry (i, j) is `sum_k q_ik k_jk d_ijk` with the forward decay d below the diagonal, the
    backward one above it, and 2 on it, where both directions see the token itself.
    """
    scores = 2 * (q * k).sum(-1)[..., None, None]
    size = 1
    while size < q.shape[-2]:
        halves = [x.unflatten(-2, (-1, 2, size)).unbind(-3) for x in (q, k, fwd, bwd)]
        (q0, q1), (k0, k1), (fwd0, fwd1), (bwd0, bwd1) = halves
        lower = (q1 * _to_here(fwd1).exp()) @ (k0 * _after_here(fwd0).exp()).mT
        upper = (q0 * _from_here(bwd0).exp()) @ (k1 * _before_here(bwd1).exp()).mT
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)
        top, bottom = torch.cat([first, upper], -1), torch.cat([lower, second], -1)
        scores = torch.cat([top, bottom], -2)
        size *= 2
    return scores.squeeze(-3)


def _from_other_chunks(q: Tensor, k: Tensor, v: Tensor, fwd: Tensor, bwd: Tensor) -> Tensor:
    """What each token reads from the chunks before it (forward) and after it (backward)."""
    states = torch.stack(
        [
            (k * _after_here(fwd).exp()).mT @ v,
            ((k * _before_here(bwd).exp()).mT @ v).flip(2),
        ]
    )
    decays = torch.stack([fwd.sum(-2), bwd.sum(-2).flip(2)])
    before, after = _exclusive_scan(states, decays).unbind()
    return (q * _to_here(fwd).exp()) @ before + (q * _from_here(bwd).exp()) @ after.flip(2)


def _exclusive_scan(states: Tensor, decays: Tensor) -> Tensor:
    """State that enters each chunk: `x_0 = 0, x_{i+1} = exp(decay_i) x_i + state_i`.

    Args:
        states: (…, n, K, V), what each chunk adds.
        decays: (…, n, K), log decay across each chunk.

    Returns:
        (…, n, K, V). Work is linear in n, depth logarithmic.
    """
    n = states.shape[-3]
    if n == 1:
        return torch.zeros_like(states)
    states = F.pad(states, (0, 0, 0, 0, 0, n % 2)).unflatten(-3, (-1, 2))
    decays = F.pad(decays, (0, 0, 0, n % 2)).unflatten(-2, (-1, 2))
    (state0, state1), (decay0, decay1) = states.unbind(-3), decays.unbind(-2)
    joined = decay1.exp()[..., None] * state0 + state1
    even = _exclusive_scan(joined, decay0 + decay1)
    odd = decay0.exp()[..., None] * even + state0
    return torch.stack([even, odd], -3).flatten(-4, -3)[..., :n, :, :]


def _to_here(gates: Tensor) -> Tensor:
    """Sum over the tokens up to this one, included, along dim -2."""
    return gates.cumsum(-2)


def _from_here(gates: Tensor) -> Tensor:
    """Sum over the tokens from this one, included, to the last."""
    return gates.flip(-2).cumsum(-2).flip(-2)


def _before_here(gates: Tensor) -> Tensor:
    """Sum over the tokens before this one."""
    return F.pad(gates[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _after_here(gates: Tensor) -> Tensor:
    """Sum over the tokens after this one."""
    return _from_here(F.pad(gates[..., 1:, :], (0, 0, 0, 1)))
