"""ImageNet-1k at 224 px, RandAugment, random erasing; unreadable files are named and skipped."""

_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

load = [dict(type='LoadImageFromFile')]
train_pipeline = [dict(type='linvis.LoadGuard', transforms=load), *_base_.train_pipeline[1:]]
test_pipeline = [
    dict(type='linvis.LoadGuard', transforms=load, max_unreadable=0),
    *_base_.test_pipeline[1:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, test_mode=True))
test_dataloader = val_dataloader
