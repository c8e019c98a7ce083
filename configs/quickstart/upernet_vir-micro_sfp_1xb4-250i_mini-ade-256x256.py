"""Quickstart: UperNet with a narrow ViR learns the pictures of data/mini/ade, from scratch.

Shows that training and testing work: it is measured on the pictures that it trains on, and the
scores say nothing about ADE20K. Backbone: ViR with 96 channels, 3 heads and 6 layers, retention in
both directions over rows and columns; the pyramid and the heads are narrower than usual, too, to be
quick on a CPU.
Data: the 28 training pictures of data/mini/ade, 8 of the 150 classes; other pixels are ignored.
Hardware: one GPU, or a CPU with 2 cores. Time: not measured yet.
Expected: not measured yet.
Command: python tools/quickstart.py --backbone vir --tasks segmentation, or
    python tools/train.py configs/quickstart/upernet_vir-micro_sfp_1xb4-250i_mini-ade-256x256.py
"""

_base_ = './_base_/upernet_mini-ade-256x256.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='linvis.ViR',
        arch=dict(embed_dims=96, depth=6, num_heads=3),
        layer_scale_init=1.0,  # from 1e-5 the layers come in late in a run this short
        retention='2d',
        direction='bidirectional',
        head_norm=True,
        img_size=256,
    ),
    neck=dict(
        type='linvis.SimpleFeaturePyramid',
        in_channels=96,
        out_channels=48,
        norm_cfg=dict(type='BN', requires_grad=True),
    ),
    decode_head=dict(in_channels=[48, 48, 48, 48]),
    auxiliary_head=dict(in_channels=48),
)
