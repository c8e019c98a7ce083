"""Hybrid ViR-B on ImageNet-1k, by a recipe of ours.

Reproduces: nothing published. The paper names hybrids without saying how they are built: network
    (112.2 M parameters, 16.5 GMACs counted here, 224 px) and recipe are ours. The recipe is that of
    ViG-H, with the learning rate and the drop path of Swin Transformer; averaged weights are
    validated.
Hardware: 8 GPUs x 128 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr. Mixed precision: --amp --cfg-options optim_wrapper.dtype=bfloat16.
Duration: not measured here.
Expected: not measured here yet; there is no value to compare with.
Command: bash tools/dist_train.sh configs/vir/vir-hybrid-base_8xb128-300e_in1k.py 8
"""

_base_ = '../_base_/recipes/in1k_300e.py'

model = dict(
    backbone=dict(type='linvis.HybridViR', arch='base', drop_path_rate=0.5),
    head=dict(in_channels=1024),
)
