"""Sanity check: ViR-S/16 from scratch on Imagenette, ten classes of ImageNet, at 224 px.

Shows that the classification pipeline is wired right: it says nothing about ImageNet-1k. Retention
is causal over rows and columns, and the class token goes to the head.
Data: data/imagenette/{train,val}/<wnid>/*.jpg, here a sample of 200 + 50 pictures a class.
Hardware: one GPU. Time: 7 minutes on an H200 with three other trainings on it.
Expected: 64 % top-1 on the validation pictures; measured 63.8 %, still rising.

    python tools/train.py configs/sanity/vir-small_1xb250-1750i_imagenette.py
"""

_base_ = './_base_/imagenette-1750i.py'

model = dict(
    backbone=dict(
        type='linvis.ViR',
        arch='small',
        retention='2d',
        direction='causal',
        out_type='cls_token',
        drop_path_rate=0.1,
    ),
    head=dict(in_channels=384),
)
