"""Mask R-CNN on 40 pictures of COCO: half of the iterations, in mixed precision with bfloat16."""

_base_ = './mask-rcnn_coco-40-640px.py'

max_iters = _base_.max_iters // 2
warmup = _base_.warmup // 2
param_scheduler = [
    dict(_base_.param_scheduler[0], end=warmup),
    dict(_base_.param_scheduler[1], begin=warmup, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')
