"""Keys that an option adds to a config, for the classes that they are for."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS

from linvis import compat
from linvis.engine import config_keys
from linvis.engine.config import load_config
from linvis.engine.errors import LaunchError

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='linvis.VRWKV', arch='tiny', norm=dict(type='Unheard'), more=dict(a=1)),
    head=dict(
        type='LinearClsHead', num_classes=10, loss=dict(type='mmdet.FocalLoss', alpha=0.5)))
train_dataloader = dict(dataset=dict(
    type='ImageNet', pipeline=[dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5)]))
train_cfg = dict(by_epoch=True, max_epochs=3)
val_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
param_scheduler = [dict(type='MultiStepLR', milestones=[1, 2])]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
env_cfg = dict(cudnn_benchmark=False)
"""


@pytest.fixture
def load(toy_folder):
    """Reads the config above with options."""
    compat.install()
    Path('deep.py').write_text(CONFIG)
    return lambda *options: load_config('deep.py', options)


@pytest.mark.parametrize(
    ('option', 'expected'),
    [
        (
            'model.backbone.drop_path_rte=0.1',
            'model.backbone (linvis.VRWKV) has no drop_path_rte (did you mean drop_path_rate?).',
        ),
        ('model.bckbone.arch=base', '(ImageClassifier) has no bckbone (did you mean backbone?).'),
        ('model.zzz=1', 'model (ImageClassifier) has no zzz.'),
        ('model.head.loss.gama=1', '(mmdet.FocalLoss) has no gama (did you mean gamma?).'),
        (
            'train_dataloader.dataset.pipeline.1.probability=1',
            'train_dataloader.dataset.pipeline.1 (RandomFlip) has no probability',
        ),
        ('train_dataloader.batchsize=4', 'no batchsize (did you mean batch_size?).'),
        (
            'train_dataloader.datasets.x=4',
            'train_dataloader has no datasets (did you mean dataset?)',
        ),
        ('train_cfg.max_iters=4', 'train_cfg has no max_iters'),
        ('val_cfg.fp_16=True', 'val_cfg has no fp_16 (did you mean fp16?)'),
        ('optim_wrapper.clip_gard.max_norm=1', 'has no clip_gard (did you mean clip_grad?)'),
        ('optim_wrapper.optimizer.beta=1', '(AdamW) has no beta (did you mean betas?)'),
        ('default_hooks.checkpoint.intervl=1', 'has no intervl (did you mean interval?)'),
        ('env_cfg.cudnn_benchmrk=True', 'has no cudnn_benchmrk (did you mean cudnn_benchmark?)'),
        ('auto_scale_lr.base_batchsize=4', 'no base_batchsize (did you mean base_batch_size?)'),
        ('randomness.sead=4', 'randomness has no sead (did you mean seed?)'),
    ],
)
def test_key_that_nobody_reads_is_named_with_a_near_one(load, option, expected):
    with pytest.raises(LaunchError) as raised:
        load(option)
    assert str(raised.value).startswith(f'--cfg-options {option}: ')
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    'options',
    [
        # arguments that the config does not have
        ['model.backbone.drop_path_rate=0.1'],
        ['train_dataloader.batch_size=4', 'train_dataloader.num_batch_per_epoch=4'],
        ['train_cfg.val_interval=4'],
        ['optim_wrapper.optimizer.betas=(0.9,0.99)', 'optim_wrapper.paramwise_cfg.any=1'],
        ['optim_wrapper.dtype=bfloat16'],
        ['optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.accumulative_counts=2'],
        ['default_hooks.checkpoint.save_optimizer=False', 'default_hooks.checkpoint.priority=LOW'],
        ['default_hooks.checkpoint.file_client_args.any=1'],
        # a class with **kwargs
        ['train_dataloader.dataset.any=1', 'param_scheduler.0.gamma=0.2'],
        # dicts that are for nobody's class, and a class that is in no registry
        ['model.backbone.more.any=1', 'model.backbone.norm.any=1', 'model.train_cfg.any.more=1'],
        # keys of a dict whose type comes later, or that has none
        ['model.backbone.init_cfg.prefix=a.', 'model.backbone.init_cfg.type=Pretrained'],
        ['model.backbone.init_cfg.any=1'],
        # what is in the config, whatever the class says
        ['model.backbone.more=3', 'model.backbone.norm.type=Other'],
        # the class that another option names
        ['model.backbone.type=mmpretrain.ResNet', 'model.backbone.base_channels=4'],
    ],
)
def test_key_that_somebody_may_read_is_merged(load, options):
    cfg = load(*options)
    for option in options:
        key, _, value = option.partition('=')
        for part in key.split('.')[:-1]:
            cfg = cfg[int(part) if part.isdecimal() else part]
        assert str(cfg[key.rpartition('.')[2]]).replace(' ', '') == value
        cfg = load(*options)


def test_keys_for_another_library_are_not_judged():
    # albumentations has a Resize of its own
    transforms = [{'type': 'Resize', 'height': 8, 'width': 8, 'p': 0.5}]
    cfg = Config(
        {'default_scope': 'mmdet', 'pipeline': [{'type': 'Albu', 'transforms': transforms}]}
    )
    assert config_keys.unknown_part(cfg, 'pipeline.0.transforms.0.p', 0) is None
    cfg.pipeline[0].type = 'RandomApply'
    assert 'Resize' in config_keys.unknown_part(cfg, 'pipeline.0.transforms.0.p', 0)


def test_key_of_a_class_that_another_option_replaces_is_unknown(load):
    options = ['model.backbone.qk_norm=1', 'model.backbone.type=mmpretrain.ResNet']
    with pytest.raises(LaunchError, match=r'model\.backbone \(mmpretrain\.ResNet\) has no qk_norm'):
        load(*options)


def test_name_in_two_registries_has_the_arguments_of_both(load):
    def first(one):
        return one

    def second(two):
        return two

    try:
        MODELS.register_module('InTwo', module=first)
        HOOKS.register_module('InTwo', module=second)
        options = ['model.head.type=InTwo', 'model.head.one=1', 'model.head.two=2']
        assert load(*options).model.head.two == 2
        with pytest.raises(LaunchError, match=r'InTwo\) has no three'):
            load(*options, 'model.head.three=3')
    finally:
        MODELS.module_dict.pop('InTwo')
        HOOKS.module_dict.pop('InTwo')


def test_scope_of_a_dict_says_where_its_classes_are(load):
    options = ['model.head._scope_=mmdet', 'model.head.type=BBoxHead', 'model.head.reg_clas=1']
    with pytest.raises(LaunchError, match=r'BBoxHead\) has no reg_clas \(did you mean reg_class_a'):
        load(*options)


NAMES = (
    'vrwkv/mask-rcnn_vrwkv-tiny_sfp_8xb2-1x_coco.py',
    'vir/upernet_vir-hybrid-tiny_8xb2-160k_ade20k-512x512.py',
    'vig/vig-h-tiny_8xb128-300e_in1k.py',
)


def keys_of(node, path=()):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, str(key))
        if isinstance(value, (dict, list, tuple)):
            yield from keys_of(value, (*path, str(key)))


@pytest.mark.parametrize('name', NAMES)
def test_no_key_of_our_configs_would_be_refused(pytestconfig, name):
    compat.install()
    cfg = Config.fromfile(pytestconfig.rootpath / 'configs' / name)
    keys = ['.'.join(key) for key in keys_of(cfg.to_dict()) if not any('.' in k for k in key)]
    assert len(keys) > 100
    unknown = [config_keys.unknown_part(cfg, key, key.count('.')) for key in keys]
    assert [text for text in unknown if text] == []
