"""Quickstart: Mask R-CNN with a narrow hybrid ViR learns 16 pictures of data/mini/coco.

Shows that training and testing work: it is measured on the pictures that it trains on, and the
scores say nothing about COCO. Backbone: hybrid ViR with 32 channels in the first stage and 5
blocks; the pyramid and the heads are narrower than usual, too, to be quick on a CPU.
Data: 16 training pictures of data/mini/coco with large objects, 8 of the 80 categories, at most 256
    px a side.
Hardware: one GPU, or a CPU with 2 cores. Time: not measured yet.
Expected: not measured yet.
Command: python tools/quickstart.py --backbone vir-hybrid --tasks detection, or
    python tools/train.py configs/quickstart/mask-rcnn_vir-hybrid-micro_fpn_1xb4-200i_mini-coco.py
"""

_base_ = './_base_/mask-rcnn_mini-coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='linvis.HybridViR',
        arch=dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(4, 8)),
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
)
