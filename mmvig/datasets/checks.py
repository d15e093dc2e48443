"""Checks of the data that a config names, before anything is built on it.

What mmdet and mmseg make of bad data is obscure or silent: training on nothing because a category
is spelt otherwise, an OpenCV assertion without the file's name, half-grey pictures of a truncated
download, a CUDA assertion for a label out of range. Here each gets one line.
"""

import inspect
import os
from collections.abc import Iterator, Sequence

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS, FUNCTIONS, Registry

from mmvig.datasets.checks_coco import check_coco
from mmvig.datasets.checks_files import require_paths
from mmvig.datasets.checks_seg import check_seg
from mmvig.datasets.shapes_files import GeneratedShapes

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def check_data(cfg: Config, loaders: Sequence[str] = LOADERS, *, open_files: bool = True) -> None:
    """Check the data of a config's loaders; to be called before the runner is built.

    Covers datasets that load as `mmdet.CocoDataset` does and those derived from
    `mmseg.BaseSegDataset`; of others only the paths. Shapes data sets are created on the way. Data
    in remote storage (`backend_args`, paths such as `s3://...`) are not checked. Under a
    distributed launcher one process a host checks.

    Args:
        cfg: A detection or segmentation config.
        loaders: The data loaders to check; those that the config lacks are skipped.
        open_files: Whether to read the ends of every image and the whole of every label map too,
            which takes seconds per ten thousand files.

    Raises:
        FileNotFoundError: If folders or files are missing.
        ValueError: If an annotation file, an image or a label map cannot be used, or a loader's
            settings do not go together.
    """
    if int(os.environ.get('LOCAL_RANK', 0)) != 0:
        return
    done = []
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        _check_loader(loader, cfg[loader])
        metrics = _metrics(cfg.get(loader.replace('dataloader', 'evaluator')))
        for dataset_cfg in _leaves(cfg[loader]['dataset']):
            job = (dataset_cfg, metrics)
            if job not in done:  # a test loader mostly repeats the validation loader
                done.append(job)
                with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
                    dataset = _build_without_data(registry, dataset_cfg)
                if dataset is None:
                    print_log(f'{loader}: {dataset_cfg["type"]} data are not checked', 'current')
                else:
                    _check_dataset(loader, dataset_cfg, dataset, metrics, open_files)


def _check_loader(name: str, loader: dict) -> None:
    """Raises ValueError for settings that mmengine and PyTorch take for a fault of the program."""
    kind = (loader.get('collate_fn') or {}).get('type')
    if isinstance(kind, str) and FUNCTIONS.get(kind) is None:
        raise ValueError(
            f'{name}.collate_fn.type is {kind!r}, which no package registers: check its spelling, '
            'or add what registers it to custom_imports'
        )
    if loader.get('persistent_workers') and not loader.get('num_workers'):
        raise ValueError(
            f'{name}.persistent_workers is True, but num_workers is 0: set '
            f'{name}.persistent_workers=False'
        )


def _metrics(evaluator: dict | list | None) -> list[dict]:
    """The metrics of an evaluator in any of the forms that mmengine takes."""
    if evaluator is None:
        return []
    return list(evaluator) if isinstance(evaluator, Sequence) else [evaluator]


def _leaves(dataset_cfg: dict) -> Iterator[dict]:
    """The datasets inside wrappers such as `ConcatDataset` and `RepeatDataset`."""
    inner = dataset_cfg.get('datasets', dataset_cfg.get('dataset'))
    if inner is None:
        yield dataset_cfg
        return
    for child in inner if isinstance(inner, Sequence) else [inner]:
        yield from _leaves(child)


def _build_without_data(registry: Registry, dataset_cfg: dict) -> BaseDataset | None:
    """A dataset that knows its classes and joined paths; None of a class that is not mmengine's."""
    kind = dataset_cfg['type']
    found = registry.get(kind) if isinstance(kind, str) else kind
    if inspect.isclass(found) and not issubclass(found, BaseDataset):
        return None
    return registry.build({**dataset_cfg, 'lazy_init': True, 'pipeline': []})


def _check_dataset(
    loader: str, dataset_cfg: dict, dataset: BaseDataset, metrics: list[dict], open_files: bool
) -> None:
    paths = [path for path in (dataset.ann_file, *dataset.data_prefix.values()) if path]
    backend = (dataset_cfg.get('backend_args') or {}).get('backend', 'local')
    if backend != 'local' or any('://' in path for path in paths):
        print_log(f'{loader}: data in remote storage are not checked', 'current')
        return
    if isinstance(dataset, GeneratedShapes):
        dataset.create()
    # A loader without a metric that reads them needs no annotations: test-dev, for example.
    annotated = not metrics or not all(metric.get('format_only') for metric in metrics)
    if _is_coco(dataset):
        check_coco(loader, dataset_cfg, dataset, metrics, annotated, open_files)
    elif _base(dataset, 'BaseSegDataset') is not None:
        check_seg(loader, dataset, annotated, open_files)
    else:
        require_paths(loader, dataset, paths)


def _base(dataset: BaseDataset, name: str) -> type | None:
    """The class of that name that a dataset derives from: mmdet and mmseg may be absent."""
    return next((base for base in type(dataset).__mro__ if base.__name__ == name), None)


def _is_coco(dataset: BaseDataset) -> bool:
    """Whether a dataset reads its files as `mmdet.CocoDataset` does; LVIS, for one, does not."""
    coco = _base(dataset, 'CocoDataset')
    methods = ('load_data_list', 'parse_data_info')
    return coco is not None and all(
        getattr(type(dataset), method) is getattr(coco, method) for method in methods
    )
