"""Point-wise spatial attention masks of PSANet, as one gather."""

import torch
from torch import Tensor

_COLLECT = 0  # mmcv's psa_type; 1 is distribute


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Lays every pixel's mask, centred on that pixel, over the feature map (PSANet, section 3.3).

    Args:
        input: (B, h_mask * w_mask, h_feature, w_feature).
        output: (B, h_feature * w_feature, h_feature, w_feature), written. Collect: channel is the
            place in the map, pixel the mask's owner; distribute: the other way round.
        psa_type: 0 collects, 1 distributes.
        num_: B.
        h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask: Sizes.
    """
    masks = input.view(num_, h_mask, w_mask, h_feature, w_feature)
    placed = _slide(masks, (h_feature, w_feature), -1, (half_h_mask, half_w_mask))
    placed = placed.flatten(1, 2)
    if psa_type != _COLLECT:
        placed = placed.flatten(2).transpose(1, 2)
    output.copy_(placed.reshape(output.shape))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Writes the gradient of `input`; arguments as in the forward."""
    if psa_type != _COLLECT:
        grad_output = grad_output.flatten(2).transpose(1, 2)
    grads = grad_output.reshape(num_, h_feature, w_feature, h_feature, w_feature)
    cut = _slide(grads, (h_mask, w_mask), 1, (-half_h_mask, -half_w_mask))
    grad_input.copy_(cut.flatten(1, 2))


def _slide(planes: Tensor, size: tuple[int, int], sign: int, shift: tuple[int, int]) -> Tensor:
    """Moves the plane that belongs to each pixel along with that pixel.

    Args:
        planes: (B, h, w, H, W), for each pixel of H x W a plane of h x w.
        size: (h', w') of the planes to make.
        sign, shift: Entry y' of pixel y's new plane is entry y' + sign * y + shift of its old one,
            0 outside; the same along x.

    Returns:
        (B, h', w', H, W).
    """
    index, inside = [], []
    for axis in range(2):
        length = planes.shape[3 + axis]
        target = torch.arange(size[axis], device=planes.device)[:, None]
        pixel = torch.arange(length, device=planes.device)
        source = target + sign * pixel + shift[axis]
        limit = planes.shape[1 + axis]
        inside.append((source >= 0) & (source < limit))
        index.append(source.clamp(0, limit - 1))
    rows, columns = index[0][:, None, :, None], index[1][None, :, None, :]
    own_y = torch.arange(planes.shape[3], device=planes.device)[:, None]
    own_x = torch.arange(planes.shape[4], device=planes.device)
    moved = planes[:, rows, columns, own_y, own_x]
    return moved.masked_fill_(~(inside[0][:, None, :, None] & inside[1][None, :, None, :]), 0)
