"""The two halves of a convolution that is computed at chosen pixels only."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Gathers the windows at the chosen pixels.

    Args:
        im: (1, C, H, W).
        mask_h_idx, mask_w_idx: (N,), int64, where the windows start in the padded image.
        col: (C * kernel_h * kernel_w, N), written.
        kernel_h, kernel_w: Size of a window.
        pad_h, pad_w: Zeros around the image.
    """
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    row = torch.arange(kernel_h, device=im.device)[:, None, None] + mask_h_idx
    column = torch.arange(kernel_w, device=im.device)[:, None] + mask_w_idx
    col.copy_(padded[:, row, column].reshape(col.shape))


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Writes the columns (channels, N) to the chosen pixels of `im` (1, channels, H, W)."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
