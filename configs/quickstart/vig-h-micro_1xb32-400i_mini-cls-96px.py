"""Quickstart: a narrow ViG-H classifies 6 kinds of objects in data/mini/imagenet, from scratch.

Shows that training and testing work; the scores say nothing about ImageNet-1k. The network is
ViG-H with 32 channels in the first stage and 5 blocks, to be quick on a CPU.
Data: 203 training and 97 validation crops of data/mini/imagenet, at 96 px.
Hardware: one GPU, or a CPU with 2 cores. Time: 8 minutes on two busy cores, tests included.
Expected: about 90 % top-1 on the training crops, 25 to 35 % on the validation crops (203 crops
    teach little that carries over); untrained, or always naming one class: at most 21 %.
Command: python tools/quickstart.py --backbone vig-h --tasks classification, or
    python tools/train.py configs/quickstart/vig-h-micro_1xb32-400i_mini-cls-96px.py
"""

_base_ = './_base_/mini-cls-96px.py'

model = dict(
    backbone=dict(
        type='linvis.ViGHierarchical',
        arch=dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    ),
    head=dict(in_channels=256),
)
