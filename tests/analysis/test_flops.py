"""Multiply-adds: the paper's rows, formulas by hand, whole models, tensors without values."""

from pathlib import Path

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmvig.analysis import Cost, count_backbone, count_model
from mmvig.analysis.shape_run import ShapeRun

CONFIGS = Path(__file__).parents[2] / 'configs'
DETECTION = (800, 1344)
SEGMENTATION = (512, 512)
# GMACs as published (arXiv 2405.18425), and to more digits
VIG = [
    ('detection/vig_t_maskrcnn', DETECTION, 61.2, 61.135),
    ('detection/vig_s_maskrcnn', DETECTION, 164.1, 164.079),
    ('detection/vig_b_maskrcnn', DETECTION, 498.5, 498.436),
    ('segmentation/vig_t_upernet', SEGMENTATION, 14.9, 14.907),
    ('segmentation/vig_s_upernet', SEGMENTATION, 40.0, 40.007),
    ('segmentation/vig_b_upernet', SEGMENTATION, 121.5, 121.528),
]
VIT = [
    ('detection/vit_t_maskrcnn', DETECTION, 147.1),
    ('detection/vit_s_maskrcnn', DETECTION, 344.5),
    ('detection/vit_b_maskrcnn', DETECTION, 893.3),
    ('detection/vit_t_window_maskrcnn', DETECTION, 95.4),
    ('detection/vit_s_window_maskrcnn', DETECTION, 241.2),
    ('detection/vit_b_window_maskrcnn', DETECTION, 686.7),
    ('segmentation/vit_t_upernet', SEGMENTATION, 20.9),
    ('segmentation/vit_s_upernet', SEGMENTATION, 54.0),
    ('segmentation/vit_b_upernet', SEGMENTATION, 157.9),
]


def load(name: str) -> Config:
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    return cfg


def backbone_cost(name: str, height: int, width: int) -> Cost:
    return count_backbone(MODELS.build(load(name).model.backbone), height, width)


def model_cost(name: str, height: int, width: int) -> Cost:
    return count_model(MODELS.build(load(name).model), height, width)


@pytest.mark.parametrize(('name', 'shape', 'published', 'recounted'), VIG)
def test_vig_rows_of_the_paper(name: str, shape: tuple, published: float, recounted: float) -> None:
    cost = backbone_cost(name, *shape)
    macs = cost.total('paper') / 1e9
    assert macs == pytest.approx(recounted, rel=1e-3)
    assert macs == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize(('name', 'shape', 'published'), VIT)
def test_vit_rows_of_the_paper(name: str, shape: tuple, published: float) -> None:
    assert backbone_cost(name, *shape).total('paper') / 1e9 == pytest.approx(published, rel=1e-2)


@pytest.mark.parametrize(('arch', 'macs'), [('t', 4.50), ('s', 8.75), ('b', 15.56)])
def test_vig_h_with_recurrence(arch: str, macs: float) -> None:
    cost = backbone_cost(f'detection/vig_h_{arch}_maskrcnn', 224, 224)
    assert cost.total('everything') / 1e9 == pytest.approx(macs, rel=7e-3)


def test_what_the_papers_counter_misses() -> None:
    cost = backbone_cost('detection/vig_t_maskrcnn', *DETECTION)
    dims, hidden, blocks = 192, 512, 12
    tokens, pyramid = 50 * 84, 100 * 168 + 50 * 84 + 25 * 42
    # an injector samples 4 points from each of three levels, an extractor from one
    samples = 4 * tokens * 3 * 4 + 6 * pyramid * 4
    missed = {
        'recurrence': 128 * tokens * dims * blocks,
        'deformable sampling': 5 * samples * dims,
        'FFNs': dims * hidden * tokens * blocks,
    }
    difference = {p: n - cost.paper.get(p, 0) for p, n in cost.everything.items()}
    assert {part: n for part, n in difference.items() if n} == missed
    assert cost.total('everything') - cost.total('paper') == sum(missed.values())
    assert cost.params == {'backbone': 8_079_536}


def test_zeros_that_fill_windows_cost_in_full_only() -> None:
    cost = backbone_cost('detection/vit_t_window_maskrcnn', 224 + 16, 224)
    full, windows = 15 * 14, 28 * 14
    linears = 8 * 4 * 192**2 * (windows - full)
    products = 8 * 2 * 192 * 196 * (windows - full)
    extra = cost.everything['mixers'] - cost.paper['mixers']
    assert extra == pytest.approx(linears + products, rel=1e-6)


def test_4096_pixels() -> None:
    """So many tokens that real tensors would take hundreds of GiB; costs grow with the area."""
    small = backbone_cost('segmentation/vig_t_upernet', 512, 512)
    large = backbone_cost('segmentation/vig_t_upernet', 4096, 4096)
    assert large.everything == {part: 64 * n for part, n in small.everything.items()}


def test_heads_agree_with_mmengines_counter() -> None:
    """It counts neither bias nor ReLU."""
    model = MODELS.build(load('detection/vig_t_retinanet').model).eval()
    feats = tuple(torch.zeros(1, 256, 64 >> i, 64 >> i) for i in range(5))
    theirs = get_model_complexity_info(
        model.bbox_head, inputs=(feats,), show_table=False, show_arch=False
    )
    assert count_model(model, 512, 512).paper['heads'] == pytest.approx(theirs['flops'], rel=1e-2)


def test_two_stages_see_as_many_boxes_as_the_settings_allow() -> None:
    cost = model_cost('detection/vig_t_fasterrcnn', 256, 256)
    pixels = sum((64 >> i) ** 2 for i in range(5))
    rpn = pixels * (9 * 256**2 + 256 * 3 * 5)
    boxes = 1000 * (49 * 256 * 1024 + 1024**2 + 1024 * (81 + 320))
    assert cost.paper['heads'] == pytest.approx(rpn + boxes, rel=1e-3)
    assert set(cost.params) == {'backbone', 'neck', 'rpn_head', 'roi_head'}


def test_detr_reads_sizes_back_and_samples() -> None:
    cost = model_cost('detection/vig_t_dino', 512, 512)
    tokens = sum((64 >> i) ** 2 for i in range(4))
    samples = 6 * (tokens + 900) * 4 * 4
    assert cost.everything['heads'] - cost.paper['heads'] == 5 * samples * 256
    assert not cost.uncounted


def test_masked_attention_runs_without_values() -> None:
    cost = model_cost('segmentation/vig_t_mask2former', 256, 256)
    queries, dims, maps = 100, 256, 64 * 64
    assert cost.paper['heads'] > 10 * queries * dims * maps  # ten predictions of masks


def test_refuses_what_is_no_detector_or_segmentor() -> None:
    with pytest.raises(ValueError, match='Linear is neither a detector nor a segmentor'):
        count_model(nn.Linear(2, 2), 64, 64)


def test_values_that_depend_on_no_image_can_be_read() -> None:
    run = ShapeRun()
    with run:
        x = run.blank(2, 3)
        sizes = torch.tensor([[4, 6], [2, 3]], device=x.device)
        assert sizes.prod(-1).tolist() == [24, 6]
        sizes += 1
        assert sizes.t().reshape(-1).tolist() == [5, 3, 7, 4]
        assert torch._shape_as_tensor(x).tolist() == [2, 3]
        assert (x.new_zeros(2, 2) / sizes).shape == (2, 2)
        assert torch.where(x > 0)[0].shape == (0,)


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    cost = count_backbone(model, 8, 8)
    assert cost.total('paper') == 8 * 8 * (3 * 8 + 8)
    assert model.training and not model[0]._forward_hooks
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name])
