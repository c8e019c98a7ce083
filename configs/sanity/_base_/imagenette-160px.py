"""Imagenette, trained on crops of 160 px and tested at 224 px.

A crop shows things larger than a whole picture does, on average by the ratio of these sizes
(Touvron et al., Fixing the train-test resolution discrepancy, arXiv:1906.06423), and takes half of
the time.
"""

_base_ = './imagenette.py'

train_pipeline = [
    dict(step, scale=160) if step['type'] == 'mmpretrain.RandomResizedCrop' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
