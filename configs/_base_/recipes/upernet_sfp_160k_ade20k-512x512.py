"""UperNet on ADE20K for 160,000 iterations for a plain backbone of 12 layers, behind a pyramid.

The schedule is that of hierarchical transformers; learning rate, weight decay and layer-wise decay
of learning rates are after Vim, which has 24 layers. A config adds the backbone and
`neck.in_channels`.
"""

_base_ = './upernet_160k_ade20k-512x512.py'

model = dict(
    neck=dict(
        type='linvis.SimpleFeaturePyramid',
        out_channels=256,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
    ),
    decode_head=dict(in_channels=[256, 256, 256, 256]),
    auxiliary_head=dict(in_channels=256),
)

# lr = 1e-4 per 32 crops x 16 crops; 0.85 is 0.92 twice.
optim_wrapper = dict(
    optimizer=dict(lr=1e-4 * 16 / 32, weight_decay=0.05),
    constructor='linvis.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
