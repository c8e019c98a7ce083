"""Quickstart: UperNet with a narrow hybrid ViR learns the pictures of data/mini/ade, from scratch.

Shows that training and testing work: it is measured on the pictures that it trains on, and the
scores say nothing about ADE20K. Backbone: hybrid ViR with 32 channels in the first stage and 5
blocks; the heads are narrower than usual, too, to be quick on a CPU.
Data: the 28 training pictures of data/mini/ade, 8 of the 150 classes; other pixels are ignored.
Hardware: one GPU, or a CPU with 2 cores. Time: not measured yet.
Expected: not measured yet.
Command: python tools/quickstart.py --backbone vir-hybrid --tasks segmentation, or
    python tools/train.py configs/quickstart/upernet_vir-hybrid-micro_1xb4-250i_mini-ade-256x256.py
"""

_base_ = './_base_/upernet_mini-ade-256x256.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='linvis.HybridViR',
        arch=dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(4, 8)),
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256]),
    auxiliary_head=dict(in_channels=128),
)
