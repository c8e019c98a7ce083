"""ViG-T on ImageNet-1k: 77.2 % top-1 published by the authors, with their recipe.

Reproduces: ViG, ViG-T (5.8 M parameters, 1.2 GMACs counted here, 224 px). The published value
    is the better one of the averaged and the trained weights; here the averaged ones are
    validated. The authors train in float32; do not train in float16,
    see docs/models/vig.md.
Hardware: 8 GPUs x 128 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr.
Duration: not measured here.
Expected: 77.2 % top-1 (published); not measured here yet.
Command: bash tools/dist_train.sh configs/vig/vig-tiny_8xb128-300e_in1k.py 8
"""

_base_ = '../_base_/recipes/in1k_300e.py'

model = dict(
    backbone=dict(type='linvis.ViG', arch='tiny', img_size=224),
    head=dict(in_channels=192),
)

# 1e-3 per 512 pictures x 1,024 pictures
optim_wrapper = dict(optimizer=dict(lr=1e-3 * 1024 / 512))
