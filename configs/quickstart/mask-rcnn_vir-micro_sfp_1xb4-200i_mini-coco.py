"""Quickstart: Mask R-CNN with a narrow ViR learns 16 pictures of data/mini/coco, from scratch.

Shows that training and testing work: it is measured on the pictures that it trains on, and the
scores say nothing about COCO. Backbone: ViR with 96 channels, 3 heads and 6 layers, retention in
both directions over rows and columns; the pyramid and the heads are narrower than usual, too, to be
quick on a CPU.
Data: 16 training pictures of data/mini/coco with large objects, 8 of the 80 categories, at most 256
    px a side.
Hardware: one GPU, or a CPU with 2 cores. Time: not measured yet.
Expected: not measured yet.
Command: python tools/quickstart.py --backbone vir --tasks detection, or
    python tools/train.py configs/quickstart/mask-rcnn_vir-micro_sfp_1xb4-200i_mini-coco.py
"""

_base_ = './_base_/mask-rcnn_mini-coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='linvis.ViR',
        arch=dict(embed_dims=96, depth=6, num_heads=3),
        layer_scale_init=1.0,  # from 1e-5 the layers come in late in a run this short
        retention='2d',
        direction='bidirectional',
        head_norm=True,
    ),
    neck=dict(
        _delete_=True,
        type='linvis.SimpleFeaturePyramid',
        in_channels=96,
        out_channels=64,
        num_outs=5,
        norm_cfg=dict(type='GN', num_groups=8),
    ),
)
