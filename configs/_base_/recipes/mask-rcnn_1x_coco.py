"""Mask R-CNN on COCO for 12 epochs with AdamW, as hierarchical transformers are trained.

Backbone and neck are still those of the library, a ResNet-50 and FPN.
"""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    '../runtime_det.py',
]

# For 8 x 2 = 16 pictures. The default constructor does not know RMSNorm for a norm, hence
# flat_decay_mult.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
