import ast
import copy
import functools
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from linvis import compat
from linvis.registry import MODELS

ROOT = Path(__file__).resolve().parents[2]
HEADER_FACTS = ('hardware', 'duration|time', 'expected', r'tools/\w+\.(py|sh)')
# Pictures of the synthetic sets, and of the shrunk pipelines.
HEIGHT, WIDTH = 96, 128
SIZES = {'scale': (WIDTH, HEIGHT), 'crop_size': (64, 64), 'stride': (48, 48)}
SIDES = {'scale': 64, 'crop_size': 64}


def _load_names():
    path = ROOT / 'tools' / 'misc' / 'check_config_names.py'
    spec = importlib.util.spec_from_file_location('check_config_names', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


names = _load_names()
CONFIGS = names.find_configs()
each_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)


@functools.cache
def _read(path: Path) -> Config:
    return Config.fromfile(path)


def _config_of(path: Path) -> Config:
    return copy.deepcopy(_read(path))


@pytest.fixture(autouse=True, scope='module')
def libraries():
    compat.install()


@pytest.fixture
def leave_no_trace():
    """Restores what a runner changes for the whole process."""
    from mmengine.registry import DefaultScope

    from linvis.utils.checkpoint import register_safe_loader

    register_safe_loader()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    DefaultScope._instance_dict.clear()


def test_there_are_configs_of_the_three_tasks():
    scopes = {_config_of(path).default_scope for path in CONFIGS}
    assert scopes == {'mmpretrain', 'mmdet', 'mmseg'}


@each_config
def test_name_follows_the_rule_and_agrees_with_the_content(path):
    parts = names.parse_name(path.name)
    cfg = _config_of(path)
    assert int(parts['batch']) == cfg.train_dataloader.batch_size
    base_batch = cfg.get('auto_scale_lr', {}).get('base_batch_size')
    assert base_batch in (None, int(parts['gpus']) * int(parts['batch']))
    count = int(parts['count'])
    if parts['unit'] in 'ex':
        assert cfg.train_cfg.max_epochs == count * {'e': 1, 'x': 12}[parts['unit']]
    else:
        assert cfg.train_cfg.max_iters == count * {'k': 1000, 'i': 1}[parts['unit']]


@pytest.mark.parametrize(
    'name',
    [
        'VRWKV-tiny_16xb64-300e_in1k.py',
        'vrwkv_tiny_small_large_16xb64-300e_in1k.py',
        'vrwkv-tiny_16x64-300e_in1k.py',
        'vrwkv-tiny_16xb64-300_in1k.py',
        'vrwkv-tiny_16xb64-300e.py',
        'vrwkv-tiny_in1k_16xb64-300e.py',
        'vrwkv-tiny__16xb64-300e_in1k.py',
    ],
)
def test_name_that_breaks_the_rule_is_refused(name):
    with pytest.raises(ValueError, match=name):
        names.parse_name(name)


def test_name_is_split_into_its_parts():
    parts = names.parse_name('mask-rcnn_vrwkv-tiny-adapter_fpn_8xb2-1x_coco.py')
    assert parts['algorithm'] == 'mask-rcnn'
    assert parts['backbone'] == 'vrwkv-tiny-adapter'
    assert parts['neck'] == 'fpn'
    assert parts['data'] == 'coco'
    assert names.parse_name('a_b_8xb2-160k_ade20k-512x512.py')['size'] == '512x512'


@each_config
def test_header_says_what_is_expected_and_how_to_run_it(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert header is not None
    assert header.splitlines()[0].endswith('.')
    missing = [fact for fact in HEADER_FACTS if not re.search(fact, header, re.IGNORECASE)]
    assert not missing
    assert path.name in header


@each_config
def test_learning_rate_falls_until_the_last_iteration(path):
    cfg = _config_of(path)
    if 'max_iters' not in cfg.train_cfg:
        return  # some recipes cool down for their last epochs
    *warmup, decay = cfg.param_scheduler
    assert decay.end == cfg.train_cfg.max_iters
    assert all(item.end <= decay.end / 10 for item in warmup)


@each_config
def test_curves_go_to_tensorboard_and_checkpoints_are_pruned(path):
    cfg = _config_of(path)
    kinds = {backend.type for backend in cfg.visualizer.vis_backends}
    assert kinds == {'LocalVisBackend', 'TensorboardVisBackend'}
    assert cfg.default_hooks.checkpoint.max_keep_ckpts >= 1


@each_config
def test_every_picture_is_loaded_under_guard(path):
    cfg = _config_of(path)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in loader.dataset.pipeline:
            assert not step.type.rpartition('.')[2].startswith('LoadImage')
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        guards = [step for step in loader.dataset.pipeline if step.type == 'linvis.LoadGuard']
        assert guards
        assert all(guard.max_unreadable == 0 for guard in guards)


def test_chosen_categories_have_the_order_of_the_annotation_file():
    # CocoDataset numbers them in that order whatever the order of the names is.
    checked = 0
    for path in CONFIGS:
        dataset = _config_of(path).train_dataloader.dataset
        classes = dataset.get('metainfo', {}).get('classes')
        if dataset.type != 'mmdet.CocoDataset' or classes is None:
            continue
        content = json.loads((ROOT / dataset.data_root / dataset.ann_file).read_text())
        in_order = [item['name'] for item in content['categories'] if item['name'] in classes]
        assert list(classes) == in_order
        checked += 1
    assert checked


@each_config
def test_metric_judges_the_pictures_of_the_data_set_only(path):
    # CocoMetric with an annotation file counts every picture in it as one that should be found.
    cfg = _config_of(path)
    for loader, evaluator in (
        (cfg.val_dataloader, cfg.val_evaluator),
        (cfg.test_dataloader, cfg.test_evaluator),
    ):
        if loader.dataset.type == 'mmdet.CocoDataset' and 'indices' in loader.dataset:
            assert evaluator.get('ann_file') is None
            assert 'instances' in loader.dataset.pipeline[-1].meta_keys


@each_config
def test_scores_are_logged_at_the_iteration_where_they_were_measured(path):
    cfg = _config_of(path)
    by_epoch = cfg.train_cfg.get('by_epoch', cfg.train_cfg.get('type') != 'IterBasedTrainLoop')
    assert cfg.default_hooks.logger.get('log_metric_by_epoch', True) is by_epoch


@each_config
def test_config_trains_one_step_and_predicts(path, tmp_path, monkeypatch, leave_no_trace):
    from linvis.engine.runner import TaskRunner

    monkeypatch.chdir(ROOT)
    # Configs are written five times; to lay out the lines takes a second.
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
    cfg = _config_of(path)
    best = cfg.default_hooks.checkpoint.get('save_best', 'auto')
    _shrink(cfg, tmp_path)
    cfg.work_dir = str(tmp_path / 'work')
    # Visualizers are found by name, those of other tests included.
    cfg.visualizer.name = path.stem
    runner = TaskRunner.from_cfg(cfg)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}

    runner.train()

    assert runner.iter == 1
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    changed = {
        name for name, value in runner.model.state_dict().items() if not value.equal(before[name])
    }
    assert any(name.startswith(('backbone.layers.0.', 'backbone.blocks.0.')) for name in changed)
    scalars = [
        json.loads(line)
        for line in next((tmp_path / 'work').glob('*/vis_data/scalars.json')).open()
    ]
    metrics = {key for line in scalars for key in line}
    assert metrics & {'accuracy/top1', 'coco/bbox_mAP', 'mIoU'}
    assert best in metrics | {'auto'}


def _shrink(cfg: Config, folder: Path) -> None:
    """Makes one training step and a validation of two small pictures out of a config."""
    task = cfg.default_scope
    root = folder / 'data'
    if cfg.model.backbone.arch == 'large':  # 10 GB; its own tests build it as a whole
        archs = MODELS.get(cfg.model.backbone.type).archs
        cfg.model.backbone.arch = dict(archs['large'], depth=2)
    for name, batch_size in (('train_dataloader', 2), ('val_dataloader', 1)):
        loader = cfg[name]
        dataset = loader.dataset
        loader.update(num_workers=0, persistent_workers=False, batch_size=batch_size)
        if 'data/mini' in dataset.data_root:
            chosen = dataset.get('indices')
            dataset.indices = 2 if chosen is None else chosen[:2]
        else:
            dataset.data_root = str(root)
            dataset.pop('indices', None)
        for step in dataset.pipeline:
            _set_sizes(step)
    _WRITERS[cfg.train_dataloader.dataset.type.rpartition('.')[2]](root)
    ann_file = cfg.val_evaluator.get('ann_file')
    if ann_file:
        cfg.val_evaluator.ann_file = str(root / 'annotations' / Path(ann_file).name)
    if task == 'mmseg':
        cfg.model.data_preprocessor.size = SIZES['crop_size']
        _set_sizes(cfg.model.test_cfg)
    if task == 'mmdet':
        cfg.model.train_cfg.rpn_proposal.max_per_img = 50
        cfg.model.train_cfg.rcnn.sampler.num = 16
        cfg.model.test_cfg.rpn.max_per_img = 50
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':  # refuses a CPU
        cfg.optim_wrapper = {
            key: cfg.optim_wrapper[key]
            for key in ('optimizer', 'paramwise_cfg', 'constructor', 'clip_grad')
            if key in cfg.optim_wrapper
        }
    # Hundreds of MB each, and they take longer to write than the step; test_interrupt.py has them.
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False, save_best=None)
    # A warm-up that starts from 0.1 % of the rate would change no float32 weight visibly.
    cfg.param_scheduler = [item for item in cfg.param_scheduler if item.type != 'LinearLR']
    for item in cfg.param_scheduler:
        item.begin = 0
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.update(max_iters=1, val_interval=1)
    else:
        cfg.train_cfg.update(max_epochs=1, val_interval=1)


def _set_sizes(step: dict) -> None:
    for key, size in SIZES.items():
        if isinstance(step.get(key), (tuple, list)):
            step[key] = size
    for key, side in SIDES.items():
        if isinstance(step.get(key), int):
            step[key] = side


def _picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _write_imagenet(root: Path) -> None:
    (root / 'meta').mkdir(parents=True)
    for split in ('train', 'val'):
        for index in range(2):
            _picture(root / split / f'{index}.JPEG', index)
        (root / 'meta' / f'{split}.txt').write_text('0.JPEG 0\n1.JPEG 999\n')


def _write_folders(root: Path) -> None:
    for split in ('train', 'val'):
        for index in range(2):
            _picture(root / split / f'class{index}' / '0.jpg', index)


def _write_coco(root: Path) -> None:
    from mmdet.datasets import CocoDataset

    (root / 'annotations').mkdir(parents=True)
    categories = [
        {'id': number, 'name': name} for number, name in enumerate(CocoDataset.METAINFO['classes'])
    ]
    for split in ('train2017', 'val2017'):
        content = {'images': [], 'annotations': [], 'categories': categories}
        for index in range(2):
            _picture(root / split / f'{index}.jpg', index)
            content['images'].append(
                {'id': index, 'file_name': f'{index}.jpg', 'height': HEIGHT, 'width': WIDTH}
            )
            content['annotations'].append(
                {
                    'id': index + 1,
                    'image_id': index,
                    'category_id': index,
                    'bbox': [20, 16, 64, 48],
                    'area': 64 * 48,
                    'iscrowd': 0,
                    'segmentation': [[20, 16, 84, 16, 84, 64, 20, 64]],
                }
            )
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def _write_ade(root: Path) -> None:
    for split in ('training', 'validation'):
        for index in range(2):
            _picture(root / 'images' / split / f'{index}.jpg', index)
            labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            labels[:, WIDTH // 2 :] = 150
            labels[: HEIGHT // 2] = 1
            path = root / 'annotations' / split / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)


_WRITERS = {
    'ImageNet': _write_imagenet,
    'CustomDataset': _write_folders,
    'CocoDataset': _write_coco,
    'ADE20KDataset': _write_ade,
}
