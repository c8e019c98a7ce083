"""Mask R-CNN on COCO for 12 epochs for a plain backbone of 12 layers, with a pyramid behind it.

The schedule is that of hierarchical transformers, the layer-wise decay of learning rates that of
Vision-RWKV. A config adds the backbone and `neck.in_channels`.
"""

_base_ = './mask-rcnn_1x_coco.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='linvis.SimpleFeaturePyramid',
        out_channels=256,
        num_outs=5,
        norm_cfg=dict(type='mmpretrain.LN2d'),
    ),
)

optim_wrapper = dict(
    constructor='linvis.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
