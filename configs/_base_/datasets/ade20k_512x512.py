"""ADE20K in crops of 512x512; unreadable files are named and skipped.

Test pictures are resized to sides that are multiples of 32.
"""

_base_ = 'mmseg::_base_/datasets/ade20k.py'

train_pipeline = [
    dict(type='linvis.LoadGuard', transforms=_base_.train_pipeline[:2]),
    *_base_.train_pipeline[2:],
]
test_pipeline = [
    dict(type='linvis.LoadGuard', transforms=_base_.test_pipeline[:1], max_unreadable=0),
    _base_.test_pipeline[1],
    dict(type='mmseg.ResizeToMultiple', size_divisor=32),
    dict(type='linvis.LoadGuard', transforms=_base_.test_pipeline[2:3], max_unreadable=0),
    _base_.test_pipeline[3],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, test_mode=True))
test_dataloader = val_dataloader
