"""Quickstart: a narrow hybrid ViR classifies 6 kinds of objects in data/mini/imagenet.

Shows that training and testing work; the scores say nothing about ImageNet-1k. The network is
hybrid ViR with 32 channels in the first stage and 5 blocks, to be quick on a CPU.
Data: 203 training and 97 validation crops of data/mini/imagenet, at 96 px.
Hardware: one GPU, or a CPU with 2 cores. Time: not measured yet.
Expected: not measured yet.
Command: python tools/quickstart.py --backbone vir-hybrid --tasks classification, or
    python tools/train.py configs/quickstart/vir-hybrid-micro_1xb32-400i_mini-cls-96px.py
"""

_base_ = './_base_/mini-cls-96px.py'

model = dict(
    backbone=dict(
        type='linvis.HybridViR', arch=dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(4, 8))
    ),
    head=dict(in_channels=256),
)
