"""Sanity check: UperNet with ViG-H-T learns 40 pictures in ADE20K's layout by heart, from scratch.

Shows that label maps, ignored pixels and resizing are wired right; it measures on the pictures that
it trains on and says nothing about other pictures. Data: the first 40 pictures of
data/ade/ADEChallengeData2016.
Hardware: one GPU; bfloat16. Time: 7 minutes on an H200 beside three other trainings.
Expected: at least 40 mIoU on those 40 pictures; measured 69.8, 94.5 % of the pixels.

    python tools/train.py configs/sanity/upernet_vig-h-tiny_1xb8-750i_ade20k-40-512x512.py
"""

_base_ = './_base_/upernet_ade20k-40-512x512-750i-bf16.py'

model = dict(
    backbone=dict(
        _delete_=True, type='linvis.ViGHierarchical', arch='tiny', out_indices=(0, 1, 2, 3)
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
