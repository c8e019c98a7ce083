"""UperNet on 40 pictures of ADE20K, to be learnt by heart: data and schedule.

A config adds the backbone, a neck if it needs one, and `in_channels` of both heads.
"""

_base_ = ['../../_base_/runtime_seg.py', 'mmseg::_base_/models/upernet_r50.py']

# iterations = 300 epochs x 40 pictures / 8 a batch
max_iters = 1500
warmup = 75
crop_size = (512, 512)
data_root = 'data/ade/ADEChallengeData2016'

model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)),
)

train_pipeline = [
    dict(
        type='linvis.LoadGuard',
        transforms=[
            dict(type='LoadImageFromFile'),
            dict(type='mmseg.LoadAnnotations', reduce_zero_label=True),
        ],
    ),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.9, 1.25), keep_ratio=True),
    dict(type='mmseg.RandomCrop', crop_size=crop_size),
    dict(type='mmseg.RandomFlip', prob=0.5),
    dict(type='mmseg.PackSegInputs'),
]
test_pipeline = [
    dict(type='linvis.LoadGuard', transforms=[dict(type='LoadImageFromFile')], max_unreadable=0),
    dict(type='mmseg.Resize', scale=(2048, 512), keep_ratio=True),
    dict(
        type='linvis.LoadGuard',
        transforms=[dict(type='mmseg.LoadAnnotations', reduce_zero_label=True)],
        max_unreadable=0,
    ),
    dict(type='mmseg.PackSegInputs'),
]
dataset = dict(
    type='mmseg.ADE20KDataset',
    data_root=data_root,
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    indices=40,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warmup),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=warmup, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=500, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='mmseg.SegVisualizationHook'),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
