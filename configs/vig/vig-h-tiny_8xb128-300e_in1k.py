"""ViG-H-T on ImageNet-1k: 82.8 % top-1 published by the authors, with their recipe.

Reproduces: ViG, ViG-H-T (28.6 M parameters, 4.5 GMACs counted here, 224 px). The published value
    is the better one of the averaged and the trained weights; here the averaged ones are
    validated. The authors train in float16: --amp.
Hardware: 8 GPUs x 128 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr.
Duration: not measured here.
Expected: 82.8 % top-1 (published); not measured here yet.
Command: bash tools/dist_train.sh configs/vig/vig-h-tiny_8xb128-300e_in1k.py 8 --amp
"""

_base_ = '../_base_/recipes/in1k_300e.py'

model = dict(
    backbone=dict(type='linvis.ViGHierarchical', arch='tiny', drop_path_rate=0.2),
    head=dict(in_channels=768),
)

# 8e-4 per 512 pictures x 1,024 pictures
optim_wrapper = dict(optimizer=dict(lr=8e-4 * 1024 / 512))
