"""Gradient to `value` of `ms_deform_attn` without atomics on it: samples sorted by pixel.

Scattering adds 4 D floats a sample into memory; instead every sample goes to the bin of its top
left corner (one bin a token and head, clamped into the map), and each token then sums what lies in
its own bin and those above, left, and above left. As bins lie in token order, the bins of a run of
tokens are two runs themselves. Bins are counted and filled with integer atomics, so the order in a
bin changes from run to run; the deterministic form sorts instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.launch import await_previous, kernel
from mmvig.kernels.ms_deform_attn_fwd import load_level, load_location, to_pixels

BLOCK = 256
TOKENS = 16


@triton.jit
def load_samples(
    p_shapes, p_starts, p_locations, base, i, mask, S, Q, H, L: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Samples number i of a batch element, whose samples start at `base`.

    Returns pixel coordinates, whether they reach into the map, head, query * L + level, and token
    of the bin.
    """
    level = i // P % L
    h = i // (L * P) % H
    query = i // (L * P) // H
    height, width, start = load_level(p_shapes, p_starts, level, S)
    x, y = load_location(p_locations, base + i, mask)
    x, y, near = to_pixels(x, y, mask, height, width)
    column = tl.maximum(tl.floor(x).to(tl.int32), 0)
    row = tl.maximum(tl.floor(y).to(tl.int32), 0)
    return x, y, near, h, query * L + level, start + row * width + column


@kernel(sizes=['S', 'Q', 'H', 'n', 'n_blocks'])
def bin_kernel(
    p_shapes, p_starts, p_locations, p_counts, p_places, S, Q, H, n, n_blocks,
    L: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """places: with COUNT each sample's place in its bin, else the bin itself; -1 outside the map.

    With COUNT also counts the samples of bin i in counts[i + 1]. Bin: (b * H + h) * S + token.
    Program: BLOCK of the n = Q * H * L * P samples of one batch element.
    """
    await_previous()
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    i = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    x, y, near, h, which, token = load_samples(
        p_shapes, p_starts, p_locations, b * n, i, i < n, S, Q, H, L, P
    )
    place = (b * H + h) * S + token
    if COUNT:
        place = tl.atomic_add(p_counts + place + 1, 1, mask=near, sem='relaxed')
    place = tl.where(near, place, -1)
    tl.store(p_places + b * n + i, place.to(p_places.dtype.element_ty), mask=i < n)


@kernel(sizes=['S', 'Q', 'H', 'n', 'n_blocks', 'n_samples'])
def fill_kernel(
    p_shapes, p_starts, p_locations, p_weights, p_first, p_places, p_records,
    S, Q, H, n, n_blocks, n_samples,
    L: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Writes the samples' records: x, y, weight, bits of query * L + level.

    COUNTED: places as counted by `bin_kernel`, relative to first[bin], and programs as there. Else
    places is the order of the samples: record r is that of sample places[r].
    """
    await_previous()
    if COUNTED:
        b = (tl.program_id(0) // n_blocks).to(tl.int64)
        i = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        base = b * n
        sample = base + i
    else:
        record = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = record < n_samples
        sample = tl.load(p_places + record, mask=mask, other=0)
        b = sample // n
        base = b * n
        i = (sample - base).to(tl.int32)
    x, y, near, h, which, token = load_samples(
        p_shapes, p_starts, p_locations, base, i, mask, S, Q, H, L, P
    )
    if COUNTED:
        record = tl.load(p_places + sample, mask=near, other=0).to(tl.int64)
        record += tl.load(p_first + (b * H + h) * S + token, mask=near, other=0)
    w = tl.load(p_weights + sample, mask=near, other=0.0).to(tl.float32)
    # Joined, the four words of a record are stored in one piece.
    words = tl.join(tl.join(x, w), tl.join(y, which.to(tl.float32, bitcast=True)))
    words = tl.reshape(words, (BLOCK, 4))
    tl.store(p_records + record[:, None] * 4 + tl.arange(0, 4)[None, :], words, mask=near[:, None])


@triton.jit
def load_run(p_records, r, n_0, n, first_0, first_1, R: tl.constexpr):
    """x, y, weight, query * L + level of records r to r + R of the n in two runs, the first of n_0.

    Beyond the n the weight is 0.
    """
    i = r + tl.arange(0, R)
    p = p_records + tl.where(i < n_0, first_0 + i, first_1 + i - n_0).to(tl.int64) * 4
    x = tl.load(p, mask=i < n, other=0.0)
    y = tl.load(p + 1, mask=i < n, other=0.0)
    w = tl.load(p + 2, mask=i < n, other=0.0)
    which = tl.load(p + 3, mask=i < n, other=0.0).to(tl.int32, bitcast=True)
    return x, y, w, which


@kernel(sizes=['S', 'Q', 'H', 'n_blocks'])
def gather_kernel(
    p_shapes, p_starts, p_first, p_records, p_do, p_dvalue, S, Q, H, n_blocks,
    L: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dvalue[token] = sum over samples of weight * hat(x - px) * hat(y - py) * do[query].

    hat(t) = max(0, 1 - |t|) is the bilinear weight, (px, py) the token's pixel. do (B, Q, H, D) and
    dvalue (B, S, H, D) contiguous; first and records as in `fill_kernel`. A program sums BD
    channels of T tokens of one head, R records at a time, as a product of a (T, R) tile of weights,
    rounded to the dtype of do, and an (R, BD) tile of do, in float32.
    """
    await_previous()
    # The last levels are the smallest, with the longest bins: their programs start first, in all
    # heads of a batch element, so that none of them is left alone at the end.
    rest = tl.program_id(0) % (n_blocks * H)
    head = tl.program_id(0) // (n_blocks * H) * H + rest % H
    t0 = (n_blocks - 1 - rest // H) * T
    b = (head // H).to(tl.int64)
    h = head % H
    tokens = t0 + tl.arange(0, T)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    mask_cols = (cols < D)[None, :]
    p_first += head.to(tl.int64) * S
    p_do += (b * Q * H + h) * D
    acc = tl.zeros((T, BD), tl.float32)
    for level in range(L):
        height, width, start = load_level(p_shapes, p_starts, level, S)
        end = start + height * width
        low = tl.maximum(t0, start)
        high = tl.minimum(t0 + T, end)
        if low < high:
            pixels = tokens - start
            py = pixels // width
            # Pixels of other levels are out of every sample's reach.
            px = tl.where((tokens >= start) & (tokens < end), pixels - py * width, -8)
            # Bins of the row above and of the row itself, from one left of the first token on.
            low_1 = tl.maximum(low - 1, start)
            low_0 = tl.maximum(low - 1 - width, start)
            first_0 = tl.load(p_first + low_0)
            n_0 = tl.load(p_first + tl.minimum(tl.maximum(high - width, start), low_1)) - first_0
            first_1 = tl.load(p_first + low_1)
            n = n_0 + tl.load(p_first + high) - first_1
            x, y, w, which = load_run(p_records, 0, n_0, n, first_0, first_1, R)
            for r in range(0, n, R):
                i = r + tl.arange(0, R)
                share = tl.where(which % L == level, w, 0.0)
                rows = (which // L).to(tl.int64) * H * D
                mask = (i < n)[:, None] & mask_cols
                do = tl.load(p_do + rows[:, None] + cols[None, :], mask=mask, other=0.0)
                # Loaded while the rows of do are on their way.
                next_x, next_y, next_w, next_which = load_run(
                    p_records, r + R, n_0, n, first_0, first_1, R
                )
                hat_x = tl.maximum(1 - tl.abs(x[None, :] - px.to(tl.float32)[:, None]), 0.0)
                hat_y = tl.maximum(1 - tl.abs(y[None, :] - py.to(tl.float32)[:, None]), 0.0)
                tile = (share[None, :] * hat_x * hat_y).to(do.dtype)
                acc = tl.dot(tile, do, acc, input_precision=PRECISION)
                x, y, w, which = next_x, next_y, next_w, next_which
    p_dvalue += (b * S * H + h) * D
    tl.store(
        p_dvalue + (tokens.to(tl.int64) * H * D)[:, None] + cols[None, :],
        acc.to(p_dvalue.dtype.element_ty),
        mask=(tokens < S)[:, None] & mask_cols,
    )


def sort_samples(
    b: int, s: int, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sorts the samples by bin.

    Returns:
        (B * H * S + 1,), where each bin's records start; (B * Q * H * L * P, 4) float32, the
        records, see `fill_kernel`.
    """
    q, h, n_levels, n_points = locations.shape[1:5]
    n = q * h * n_levels * n_points
    n_bins, n_blocks = b * h * s, ceil_div(n, BLOCK)
    integer = torch.int32 if max(n_bins, b * n) < 2**31 else torch.int64
    places = torch.empty(b * n, dtype=integer, device=locations.device)
    first = places.new_zeros(0 if deterministic else n_bins + 1)
    sizes = dict(L=n_levels, P=n_points, BLOCK=BLOCK)
    bin_kernel[(b * n_blocks,)](
        shapes, starts, locations, first, places, s, q, h, n, n_blocks,
        **sizes, COUNT=not deterministic,
    )  # fmt: skip
    if deterministic:
        bins, places = places.sort(stable=True)
        edges = torch.arange(n_bins + 1, dtype=integer, device=locations.device)
        first = torch.searchsorted(bins, edges)
    else:
        first = first.cumsum(0, dtype=integer)
    records = torch.empty(b * n, 4, dtype=torch.float32, device=locations.device)
    fill_kernel[(b * n_blocks if not deterministic else ceil_div(b * n, BLOCK),)](
        shapes, starts, locations, weights, first, places, records, s, q, h, n, n_blocks, b * n,
        **sizes, COUNTED=not deterministic,
    )  # fmt: skip
    return first, records


def value_gradient(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    do: Tensor,
    deterministic: bool,
) -> Tensor:
    """Gradient to `value`, contiguous, in its dtype.

    Locations as `pairs` makes them, value with a contiguous last dim, the rest contiguous.
    """
    b, s, h, d = value.shape
    q, n_levels, n_points = locations.shape[1], *locations.shape[3:5]
    first, records = sort_samples(b, s, shapes, starts, locations, weights, deterministic)
    dvalue = torch.empty(b, s, h, d, dtype=value.dtype, device=value.device)
    n_blocks = ceil_div(s, TOKENS)
    block_d = min(max(power_of_2(d), 16), 128)
    # Records at once: no more than the bins of a token usually hold.
    dense = q * n_levels * n_points > 8 * s
    gather_kernel[(n_blocks * b * h, ceil_div(d, block_d))](
        shapes, starts, first, records, do, dvalue, s, q, h, n_blocks,
        L=n_levels, D=d, BD=block_d, T=TOKENS, R=32 if dense else 16,
        PRECISION='tf32x3' if do.dtype == torch.float32 else None,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    return dvalue
