"""UperNet on the pictures of data/mini/ade: data, narrow heads and schedule.

A config adds the backbone, a neck if it needs one, and `in_channels` of both heads.
"""

_base_ = ['../../_base_/runtime_seg.py', 'mmseg::_base_/models/upernet_swin.py']

# 250 iterations = 35 epochs x 28 pictures / 4 a batch
max_iters = 250
classes = ('wall', 'sky', 'tree', 'grass', 'person', 'table', 'food', 'animal')
crop_size = (256, 256)

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(channels=48, num_classes=len(classes), norm_cfg=norm_cfg),
    auxiliary_head=dict(channels=48, num_classes=len(classes), norm_cfg=norm_cfg),
)

train_pipeline = [
    dict(
        type='linvis.LoadGuard',
        transforms=[dict(type='LoadImageFromFile'), dict(type='mmseg.LoadAnnotations')],
    ),
    dict(type='RandomResize', scale=(320, 320), ratio_range=(0.85, 1.2), keep_ratio=True),
    dict(type='mmseg.RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='mmseg.RandomFlip', prob=0.5),
    dict(type='mmseg.PackSegInputs'),
]
test_pipeline = [
    dict(type='linvis.LoadGuard', transforms=[dict(type='LoadImageFromFile')], max_unreadable=0),
    dict(type='mmseg.Resize', scale=(320, 320), keep_ratio=True),
    dict(
        type='linvis.LoadGuard', transforms=[dict(type='mmseg.LoadAnnotations')], max_unreadable=0
    ),
    dict(type='mmseg.PackSegInputs'),
]
dataset = dict(
    type='mmseg.ADE20KDataset', data_root='data/mini/ade', metainfo=dict(classes=classes)
)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=50)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=50, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='mmseg.SegVisualizationHook'),
)
log_processor = dict(by_epoch=False, window_size=10)
randomness = dict(seed=0)
