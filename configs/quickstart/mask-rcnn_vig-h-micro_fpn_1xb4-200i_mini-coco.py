"""Quickstart: Mask R-CNN with a narrow ViG-H learns 16 pictures of data/mini/coco, from scratch.

Shows that training and testing work: it is measured on the pictures that it trains on, and the
scores say nothing about COCO. Backbone: ViG-H with 32 channels in the first stage and 5 blocks; the
pyramid and the heads are narrower than usual, too, to be quick on a CPU.
Data: 16 training pictures of data/mini/coco with large objects, 8 of the 80 categories, at most 256
    px a side.
Hardware: one GPU, or a CPU with 2 cores. Time: 7 minutes on two busy cores, tests included.
Expected: at least 40 % box mAP and 15 % mask mAP on the 16 pictures; untrained: 0.
Command: python tools/quickstart.py --backbone vig-h --tasks detection, or
    python tools/train.py configs/quickstart/mask-rcnn_vig-h-micro_fpn_1xb4-200i_mini-coco.py
"""

_base_ = './_base_/mask-rcnn_mini-coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='linvis.ViGHierarchical',
        arch=dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
)
