"""Imagenette, trained on crops of 160 px and tested at 224 px.

A crop shows things larger than a whole picture does, on average by the ratio of these sizes
(Touvron et al., Fixing the train-test resolution discrepancy, arXiv:1906.06423), and takes half of
the time.
"""

_base_ = './imagenette.py'

train_pipeline = [
    dict(type='linvis.LoadGuard', transforms=[dict(type='LoadImageFromFile')]),
    dict(type='mmpretrain.RandomResizedCrop', scale=160, crop_ratio_range=(0.25, 1.0)),
    # where pictures are smallest, and before OpenCV meets the negative strides that flips return
    dict(type='mmpretrain.ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(type='mmpretrain.RandomFlip', prob=0.5),
    dict(type='mmpretrain.PackInputs', meta_keys=()),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
