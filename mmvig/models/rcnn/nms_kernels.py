"""Greedy non-maximum suppression of many groups of boxes side by side, in two kernels.

torchvision's takes the groups one after the other, and walks through the boxes of each one by
one: 9 ms for the proposals of two images on an H200. Here a group is one program, and a step of
its walk decides 32 boxes: 0.24 ms.

Shape legend: P groups, N boxes of a group, W words of 32 boxes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.launch import kernel

# Rows of the table that a program fills; one word is 32 boxes.
_ROWS = 64
_WORD = tl.constexpr(32)


def greedy_nms(boxes: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes are kept, (P, N), bool; arguments as of `boxes.suppress`, on a GPU."""
    groups, count, _ = boxes.shape
    words = ceil_div(count, 32)
    worse = torch.empty(groups, words * 32, words, dtype=torch.int32, device=boxes.device)
    keep = torch.empty_like(valid)
    if not keep.numel():
        return keep
    _overlap_kernel[(ceil_div(words * 32, _ROWS), words, groups)](
        boxes.contiguous(), worse, count, words, iou_threshold, ROWS=_ROWS, num_warps=2
    )
    _walk_kernel[(groups,)](
        valid.contiguous(), worse, keep, count, words, power_of_2(words), num_warps=1
    )
    return keep


@kernel(sizes=['count', 'words'])
def _overlap_kernel(p_boxes, p_worse, count, words, threshold, ROWS: tl.constexpr):
    """Bit j of word w of row i: whether box i is better than box 32 w + j and overlaps it.

    Boxes (P, N, 4), float32; table (P, 32 W, W), int32. A program fills one word of ROWS rows.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, _WORD)
    j = tl.program_id(1) * _WORD + bit
    group = tl.program_id(2).to(tl.int64)
    p_boxes += group * count * 4
    left_i, top_i, right_i, bottom_i = _load_boxes(p_boxes, i, count)
    left_j, top_j, right_j, bottom_j = _load_boxes(p_boxes, j, count)
    width = tl.minimum(right_i[:, None], right_j) - tl.maximum(left_i[:, None], left_j)
    height = tl.minimum(bottom_i[:, None], bottom_j) - tl.maximum(top_i[:, None], top_j)
    overlap = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area_i = (right_i - left_i) * (bottom_i - top_i)
    area_j = (right_j - left_j) * (bottom_j - top_j)
    union = area_i[:, None] + area_j - overlap
    over = (tl.div_rn(overlap, union) > threshold) & (j > i[:, None])
    bits = tl.sum(tl.where(over, 1 << bit, 0), 1)
    row = group * words * _WORD + i
    tl.store(p_worse + row * words + tl.program_id(1), bits, mask=i < words * _WORD)


@kernel(sizes=['count', 'words'])
def _walk_kernel(p_valid, p_worse, p_keep, count, words, WORDS: tl.constexpr):
    """Keeps the best box that is left, drops what it overlaps, and so on, a word at a time.

    `gone` holds a bit for every box dropped so far. Within a word the 32 decisions depend on each
    other; what they drop in later words is then gathered from 32 rows at once.
    """
    group = tl.program_id(0).to(tl.int64)
    p_valid += group * count
    p_keep += group * count
    p_worse += group * words * _WORD * words
    bit = tl.arange(0, _WORD)
    word = tl.arange(0, WORDS)
    gone = tl.zeros((WORDS,), tl.int32)
    for block in range(words):
        inside = block * _WORD + bit < count
        valid = tl.load(p_valid + block * _WORD + bit, mask=inside, other=0).to(tl.int32)
        alive = tl.sum(valid << bit) & ~tl.sum(tl.where(word == block, gone, 0))
        for i in tl.static_range(_WORD):
            drops = tl.load(p_worse + (block * _WORD + i) * words + block)
            alive = tl.where(((alive >> i) & 1) != 0, alive & ~drops, alive)
        kept = ((alive >> bit) & 1) != 0
        tl.store(p_keep + block * _WORD + bit, kept, mask=inside)
        rows = (block * _WORD + bit[:, None]) * words + word
        drops = tl.load(p_worse + rows, mask=kept[:, None] & (word < words), other=0)
        gone |= tl.reduce(drops, 0, _either)


@triton.jit
def _load_boxes(p_boxes, index, count):
    """Left, top, right and bottom sides of boxes; 0 beyond the last."""
    p_box, inside = p_boxes + index * 4, index < count
    left = tl.load(p_box, mask=inside, other=0.0)
    top = tl.load(p_box + 1, mask=inside, other=0.0)
    right = tl.load(p_box + 2, mask=inside, other=0.0)
    bottom = tl.load(p_box + 3, mask=inside, other=0.0)
    return left, top, right, bottom


@triton.jit
def _either(a, b):
    return a | b
