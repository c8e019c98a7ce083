"""Quickstart: a narrow ViG classifies 6 kinds of objects in data/mini/imagenet, from scratch.

Shows that training and testing work; the scores say nothing about ImageNet-1k. The network is
ViG with 96 channels, 3 heads, 6 layers and patches of 12 pixels, to be quick on a CPU.
Data: 203 training and 97 validation crops of data/mini/imagenet, at 96 px.
Hardware: one GPU, or a CPU with 2 cores. Time: 9 minutes on two busy cores, tests included.
Expected: about 75 % top-1 on the training crops, 25 to 35 % on the validation crops (203 crops
    teach little that carries over); untrained, or always naming one class: at most 21 %.
Command: python tools/quickstart.py --backbone vig --tasks classification, or
    python tools/train.py configs/quickstart/vig-micro_1xb32-400i_mini-cls-96px.py
"""

_base_ = './_base_/mini-cls-96px.py'

model = dict(
    backbone=dict(
        type='linvis.ViG',
        arch=dict(embed_dims=96, depth=6, num_heads=3),
        img_size=96,
        patch_size=12,
    ),
    head=dict(in_channels=96),
)
