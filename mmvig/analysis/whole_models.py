"""One pass of a whole detector or segmentor over a blank image."""

from collections.abc import Callable

from torch import Tensor, nn


def run_model(model: nn.Module, blank: Callable[..., Tensor], height: int, width: int) -> None:
    """Runs a model as in inference, up to where its post-processing starts.

    Args:
        model: A detector of mmdet or segmentor of mmseg.
        blank: Makes a tensor of a given shape.
        height, width: Of the image, in pixels.

    Raises:
        ValueError: For a model of another kind.
    """
    images = blank(1, 3, height, width)
    shape = (height, width)
    meta = dict(
        img_shape=shape,
        ori_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
    )
    if hasattr(model, 'encode_decode'):
        model.encode_decode(images, [meta])
    elif hasattr(model, 'rpn_head'):
        _run_two_stages(model, images, blank)
    elif hasattr(model, 'extract_feat'):
        from mmdet.structures import DetDataSample

        model(images, [DetDataSample(metainfo=meta)], mode='tensor')
    else:
        raise ValueError(f'{type(model).__name__} is neither a detector nor a segmentor')


def _run_two_stages(model: nn.Module, images: Tensor, blank: Callable[..., Tensor]) -> None:
    """Without values there are no proposals: the boxes are as many as the test settings allow."""
    feats = model.extract_feat(images)
    model.rpn_head(feats)
    roi, test_cfg = model.roi_head, model.test_cfg
    _run_stage(roi.bbox_head, roi.bbox_roi_extractor, test_cfg.rpn.max_per_img, blank)
    if roi.with_mask:
        _run_stage(roi.mask_head, roi.mask_roi_extractor, test_cfg.rcnn.max_per_img, blank)


def _run_stage(
    heads: nn.Module, extractors: nn.Module, num_boxes: int, blank: Callable[..., Tensor]
) -> None:
    """Runs a head, or each of a cascade, on that many boxes."""
    if not isinstance(heads, nn.ModuleList):
        heads, extractors = [heads], [extractors]
    for head, extractor in zip(heads, extractors, strict=True):
        head(blank(num_boxes, extractor.out_channels, *extractor.roi_layers[0].output_size))
