"""Sanity check: ViR-S/16 from scratch on Imagenette, ten classes of ImageNet, at 160 px.

Shows that the classification pipeline is wired right: it says nothing about ImageNet-1k. Retention
is causal over rows and columns, and the class token goes to the head.
Data: data/imagenette/{train,val}/<wnid>/*.jpg, here a sample of 200 + 50 pictures a class.
Hardware: one GPU. Time: 8 minutes on an NVIDIA H200 with 16 CPU cores, beside two others like it.
Expected: 71.6 % top-1 on the validation pictures (seed 0, bfloat16, 2026-11-23).

    python tools/train.py configs/sanity/vir-small_1xb250-3500i_imagenette-160px.py
"""

_base_ = './_base_/imagenette-160px.py'

model = dict(
    backbone=dict(
        type='linvis.ViR',
        arch='small',
        img_size=160,
        retention='2d',
        direction='causal',
        out_type='cls_token',
        drop_path_rate=0.1,
    ),
    head=dict(in_channels=384),
)
