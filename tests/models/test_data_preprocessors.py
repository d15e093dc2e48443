"""The data preprocessors that do not wait against mmdet's and mmseg's: the same bits."""

import copy
from importlib import import_module

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData

import mmvig  # noqa: F401

SETTINGS = dict(mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4])
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize('device', DEVICES)


def pair(scope: str, name: str, **settings: object) -> list[torch.nn.Module]:
    pytest.importorskip(scope, reason=f'{scope} is not installed')
    import_module(f'{scope}.models')
    with DefaultScope.overwrite_default_scope(scope):
        registry = import_module(f'{scope}.registry').MODELS
        kinds = (f'Async{name}', name)
        return [registry.build(dict(SETTINGS, type=kind, **settings)) for kind in kinds]


def images(*sizes: tuple[int, int], channels: int = 3) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (channels, *size), dtype=torch.uint8) for size in sizes]


@devices
@pytest.mark.parametrize('order', [dict(bgr_to_rgb=True), dict(rgb_to_bgr=True), {}], ids=str)
@pytest.mark.parametrize('stacked', [False, True])
def test_det(stacked: bool, order: dict, device: str) -> None:
    DetDataSample = pytest.importorskip('mmdet.structures').DetDataSample
    inputs = images((21, 33), (21, 33) if stacked else (40, 9))
    samples = [DetDataSample(metainfo=dict(img_shape=x.shape[1:])) for x in inputs]
    found = []
    settings = dict(pad_size_divisor=32, pad_value=7, **order)
    for preprocess in pair('mmdet', 'DetDataPreprocessor', **settings):
        data = dict(inputs=torch.stack(inputs) if stacked else inputs, data_samples=samples)
        found.append(preprocess.to(device)(copy.deepcopy(data), training=True))
    ours, theirs = found
    assert ours['inputs'].device.type == device
    assert torch.equal(ours['inputs'], theirs['inputs'])
    for own, other in zip(ours['data_samples'], theirs['data_samples'], strict=True):
        assert own.metainfo == other.metainfo


@devices
@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('training', [True, False])
def test_seg(training: bool, stacked: bool, device: str) -> None:
    SegDataSample = pytest.importorskip('mmseg.structures').SegDataSample
    inputs = images((21, 33), (21, 33))
    samples = [SegDataSample(metainfo=dict(img_shape=x.shape[1:])) for x in inputs]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 5, (1, 21, 33)))
    found = []
    for preprocess in pair('mmseg', 'SegDataPreProcessor', bgr_to_rgb=True, size=(40, 40)):
        data = dict(inputs=torch.stack(inputs) if stacked else inputs, data_samples=samples)
        found.append(preprocess.to(device)(copy.deepcopy(data), training=training))
    assert torch.equal(found[0]['inputs'], found[1]['inputs'])


def test_images_of_other_channels_stay_as_they_are() -> None:
    (ours, _) = pair('mmseg', 'SegDataPreProcessor', mean=None, std=None, bgr_to_rgb=True)
    inputs = images((4, 5), channels=4)
    out = ours(dict(inputs=copy.deepcopy(inputs)))['inputs']
    assert torch.equal(out, inputs[0][None].float())


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    """Whose images are pinned, for a device that is at work."""
    ours, _ = pair('mmdet', 'DetDataPreprocessor', bgr_to_rgb=True)
    ours.cuda()
    data = dict(inputs=[x.pin_memory() for x in images((21, 33), (40, 9))])
    ours(copy.copy(data))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        ours(copy.copy(data))
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_they_are_found_without_a_scope() -> None:
    pytest.importorskip('mmdet', reason='mmdet is not installed')
    settings = dict(type='AsyncDetDataPreprocessor', non_blocking=False)
    assert MODELS.build(settings)._non_blocking is False


@pytest.mark.parametrize(
    'norm',
    [
        dict(mean=None, std=None),
        dict(mean=[0, 0, 0], std=[255.0, 255.0, 255.0]),
        dict(mean=[0, 0, 0], std=[1, 1, 1]),
    ],
    ids=['none', 'integer means', 'integers'],
)
@pytest.mark.parametrize('channels', [3, 4])
def test_what_goes_mmengines_way(channels: int, norm: dict) -> None:
    data = dict(inputs=images((21, 33), (40, 9), channels=channels))
    settings = dict(norm, bgr_to_rgb=True, pad_size_divisor=16)
    ours, theirs = (p(copy.copy(data)) for p in pair('mmdet', 'DetDataPreprocessor', **settings))
    assert torch.equal(ours['inputs'], theirs['inputs'])
