"""Sanity check: ViG-T from scratch on Imagenette, ten classes of ImageNet, at 224 px.

Shows that the classification pipeline is wired right: it says nothing about ImageNet-1k.
Data: data/imagenette/{train,val}/<wnid>/*.jpg, here a sample of 200 + 50 pictures a class.
Hardware: one GPU. Time: at most 0.09 s an iteration on an H200 with 20 loader workers, 6 minutes in
all (measured with the colour jitter behind the crop, where it costs the workers twice as much).
Expected: at least 71 % top-1 on the validation pictures; measured 80.8 %.

    python tools/train.py configs/sanity/vig-tiny_1xb250-3500i_imagenette.py
"""

_base_ = './_base_/imagenette.py'

model = dict(
    backbone=dict(type='linvis.ViG', arch='tiny', out_type='avg_featmap', drop_path_rate=0.05),
    head=dict(in_channels=192),
)
