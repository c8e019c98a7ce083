"""COCO 2017 instances at 1333x800; unreadable files are named and skipped."""

_base_ = 'mmdet::_base_/datasets/coco_instance.py'

train_pipeline = [
    dict(type='linvis.LoadGuard', transforms=_base_.train_pipeline[:2]),
    *_base_.train_pipeline[2:],
]
test_pipeline = [
    dict(type='linvis.LoadGuard', transforms=_base_.test_pipeline[:1], max_unreadable=0),
    *_base_.test_pipeline[1:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
