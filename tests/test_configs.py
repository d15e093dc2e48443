"""Every config builds, states its recipe, and runs a training and an inference step."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

ROOT = Path(__file__).parents[1] / 'configs'
CONFIGS = sorted(str(f.relative_to(ROOT).with_suffix('')) for f in ROOT.glob('*/*.py'))
HEIGHT, WIDTH = 64, 96


def load(name: str) -> Config:
    """A config, its default scope set."""
    cfg = Config.fromfile(ROOT / f'{name}.py')
    init_default_scope(cfg.default_scope)
    return cfg


def shrink(cfg: Config) -> None:
    """Lets a model run on images of HEIGHT x WIDTH, with few boxes and points, for speed."""
    preprocessor = cfg.model.data_preprocessor
    if 'size' in preprocessor:
        preprocessor.size = (HEIGHT, WIDTH)
    if 'batch_augments' in preprocessor:
        preprocessor.batch_augments = None
    if cfg.model.type == 'DINO':
        cfg.model.num_queries = 50  # each takes a token; there are 128
    if 'roi_head' in cfg.model:
        cfg.model.train_cfg.rpn_proposal.max_per_img = 100
        cfg.model.test_cfg.rpn.max_per_img = 100
        cfg.model.test_cfg.rcnn.max_per_img = 10
    for settings in (cfg.model.get('train_cfg'), cfg.model.get('decode_head', {}).get('train_cfg')):
        if settings and 'num_points' in settings:
            settings.num_points = 256


def find_num_classes(settings: dict | list) -> int | None:
    """The number of classes that the first head in a detector's config has."""
    values = settings.values() if isinstance(settings, dict) else settings
    if isinstance(settings, dict):
        for key in ('num_classes', 'num_things_classes'):
            if key in settings:
                return settings[key]
    nested = (find_num_classes(v) for v in values if isinstance(v, dict | list))
    return next((found for found in nested if found), None)


def detection_sample(num_classes: int):
    """Two boxes with masks, as mmdet's pipelines pack them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[8.0, 8, 40, 40], [30, 20, 80, 60]])
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    sample = DetDataSample()
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(boxes),
        labels=torch.tensor([0, num_classes - 1]),
        masks=BitmapMasks(masks.numpy(), HEIGHT, WIDTH),
    )
    sample.ignored_instances = InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4)))
    return sample


def segmentation_sample(num_classes: int):
    """A label map with every class and some ignored pixels."""
    from mmseg.structures import SegDataSample

    labels = torch.arange(HEIGHT * WIDTH).view(1, HEIGHT, WIDTH) % num_classes
    labels[:, :4] = 255
    return SegDataSample(gt_sem_seg=PixelData(data=labels))


def batch(cfg: Config, model: BaseModel) -> dict:
    """Two random images with annotations, before the data preprocessor."""
    if cfg.default_scope == 'mmdet':
        make, num_classes = detection_sample, find_num_classes(cfg.model)
    else:
        make, num_classes = segmentation_sample, model.num_classes
    samples = [make(num_classes) for _ in range(2)]
    for sample in samples:
        sample.set_metainfo(
            dict(
                img_shape=(HEIGHT, WIDTH),
                ori_shape=(HEIGHT, WIDTH),
                scale_factor=(1.0, 1.0),
                batch_input_shape=(HEIGHT, WIDTH),
                flip=False,
            )
        )
    images = [torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in samples]
    return dict(inputs=images, data_samples=samples)


def training_loss(model: BaseModel, data: dict) -> Tensor:
    """Sum of the losses of a batch."""
    data = model.data_preprocessor(data, training=True)
    return model.parse_losses(model(**data, mode='loss'))[0]


@pytest.mark.parametrize('name', CONFIGS)
def test_trains_and_infers(name: str) -> None:
    cfg = load(name)
    shrink(cfg)
    model = MODELS.build(cfg.model)
    data = batch(cfg, model)

    loss = training_loss(model.train(), data)
    loss.backward()
    assert loss.isfinite()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    with torch.no_grad():
        results = model.eval().test_step(data)
    assert len(results) == 2
    if cfg.default_scope == 'mmdet':
        found = results[0].pred_instances
        assert found.bboxes.shape == (len(found.scores), 4)
        if 'segm' in cfg.val_evaluator.metric:
            assert found.masks.shape == (len(found.scores), HEIGHT, WIDTH)
    else:
        assert results[0].pred_sem_seg.data.shape == (1, HEIGHT, WIDTH)


DROP_PATH = dict(t=0.1, s=0.2, b=0.3)


@pytest.mark.parametrize('trunk', ['vig', 'vit'])
@pytest.mark.parametrize('arch', ['t', 's', 'b'])
def test_detection_recipe(trunk: str, arch: str) -> None:
    cfg = load(f'detection/{trunk}_{arch}_maskrcnn')
    optim = cfg.optim_wrapper
    assert (optim.optimizer.type, optim.optimizer.lr, optim.optimizer.weight_decay) == (
        'FusedAdamW',
        1e-4,
        0.05,
    )
    assert optim.paramwise_cfg == dict(layer_decay_rate=0.85)
    assert optim.get('clip_grad') is None
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end, warm_up.by_epoch) == (1e-3, 500, False)
    assert (steps.milestones, cfg.train_cfg.max_epochs) == ([8, 11], 12)
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.model.backbone.trunk.drop_path_rate == DROP_PATH[arch]
    assert cfg.model.backbone.token_maps == 'last'
    assert (cfg.model.neck.out_channels, cfg.model.neck.num_outs) == (256, 5)
    assert cfg.auto_scale_lr.base_batch_size == 16


@pytest.mark.parametrize('trunk', ['vig', 'vit'])
@pytest.mark.parametrize(
    ('arch', 'lr', 'decay'), [('t', 1.2e-4, 0.95), ('s', 6e-5, 0.85), ('b', 6e-5, 0.80)]
)
def test_segmentation_recipe(trunk: str, arch: str, lr: float, decay: float) -> None:
    cfg = load(f'segmentation/{trunk}_{arch}_upernet')
    optim = cfg.optim_wrapper
    assert (optim.optimizer.lr, optim.optimizer.weight_decay) == (lr, 0.01)
    assert optim.paramwise_cfg == dict(layer_decay_rate=decay)
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
    assert (poly.power, poly.eta_min, poly.begin, poly.end) == (1.0, 0.0, 1500, 160000)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160000, 16000)
    assert cfg.model.backbone.trunk.drop_path_rate == DROP_PATH[arch]
    assert cfg.model.backbone.token_maps == 'each'
    assert cfg.model.auxiliary_head.in_index == 2
    assert cfg.model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
