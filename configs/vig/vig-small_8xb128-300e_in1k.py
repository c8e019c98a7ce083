"""ViG-S on ImageNet-1k: 81.7 % top-1 published by the authors, with their recipe.

Reproduces: ViG, ViG-S (22.6 M parameters, 4.5 GMACs counted here, 224 px). The published value
    is the better one of the averaged and the trained weights; here the averaged ones are
    validated. The authors train in float32; do not train in float16,
    see docs/models/vig.md.
Hardware: 8 GPUs x 128 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr.
Duration: not measured here.
Expected: 81.7 % top-1 (published); not measured here yet.
Command: bash tools/dist_train.sh configs/vig/vig-small_8xb128-300e_in1k.py 8
"""

_base_ = '../_base_/recipes/in1k_300e.py'

model = dict(
    backbone=dict(type='linvis.ViG', arch='small', img_size=224, drop_path_rate=0.2),
    head=dict(in_channels=384),
)

optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
