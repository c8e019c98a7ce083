"""Imagenette with half of the iterations."""

_base_ = './imagenette.py'

max_iters = _base_.max_iters // 2
warmup = _base_.warmup // 2
param_scheduler = [
    dict(_base_.param_scheduler[0], end=warmup),
    dict(_base_.param_scheduler[1], begin=warmup, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
