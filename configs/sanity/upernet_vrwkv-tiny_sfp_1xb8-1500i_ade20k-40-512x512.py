"""Sanity check: UperNet with VRWKV-T learns 40 pictures in ADE20K's layout by heart, from scratch.

Shows that label maps, ignored pixels and resizing are wired right; it measures on the pictures that
it trains on and says nothing about other pictures. Data: the first 40 pictures of
data/ade/ADEChallengeData2016.
Hardware: one GPU. Time: at most 0.33 s an iteration on an H200, 8 minutes in all.
Expected: at least 40 mIoU on those 40 pictures; measured 76.1, and 95.6 % of the pixels.

    python tools/train.py configs/sanity/upernet_vrwkv-tiny_sfp_1xb8-1500i_ade20k-40-512x512.py
"""

_base_ = './_base_/upernet_ade20k-40-512x512.py'

model = dict(
    backbone=dict(_delete_=True, type='linvis.VRWKV', arch='tiny', img_size=512),
    neck=dict(
        type='linvis.SimpleFeaturePyramid',
        in_channels=192,
        out_channels=192,
        norm_cfg=dict(type='mmpretrain.LN2d'),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
