"""Sanity check: UperNet with hybrid ViR-T learns 40 pictures in ADE20K's layout, from scratch.

Shows that label maps, ignored pixels and resizing are wired right; it measures on the pictures that
it trains on and says nothing about other pictures. Data: the first 40 pictures of
data/ade/ADEChallengeData2016.
Hardware: one GPU; bfloat16. Time: 7 minutes on an H200 beside three other trainings.
Expected: at least 40 mIoU on those 40 pictures; measured 61.1, 91.4 % of the pixels.

    python tools/train.py configs/sanity/upernet_vir-hybrid-tiny_1xb8-750i_ade20k-40-512x512.py
"""

_base_ = './_base_/upernet_ade20k-40-512x512-750i-bf16.py'

model = dict(
    backbone=dict(_delete_=True, type='linvis.HybridViR', arch='tiny', out_indices=(0, 1, 2, 3)),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
