"""Quickstart: a narrow ViR classifies 6 kinds of objects in data/mini/imagenet, from scratch.

Shows that training and testing work; the scores say nothing about ImageNet-1k. The network is
ViR with 96 channels, 3 heads, 6 layers and patches of 12 pixels, to be quick on a CPU. Retention is
causal over rows and columns, and the class token goes to the head.
Data: 203 training and 97 validation crops of data/mini/imagenet, at 96 px.
Hardware: one GPU, or a CPU with 2 cores. Time: not measured yet.
Expected: not measured yet.
Command: python tools/quickstart.py --backbone vir --tasks classification, or
    python tools/train.py configs/quickstart/vir-micro_1xb32-400i_mini-cls-96px.py
"""

_base_ = './_base_/mini-cls-96px.py'

model = dict(
    backbone=dict(
        type='linvis.ViR',
        arch=dict(embed_dims=96, depth=6, num_heads=3),
        layer_scale_init=1.0,  # from 1e-5 the layers come in late in a run this short
        retention='2d',
        direction='causal',
        img_size=96,
        patch_size=12,
        out_type='cls_token',
    ),
    neck=None,
    head=dict(in_channels=96),
)
