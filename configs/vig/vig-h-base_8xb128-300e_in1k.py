"""ViG-H-B on ImageNet-1k: 84.2 % top-1 published by the authors, with their recipe.

Reproduces: ViG, ViG-H-B (88.9 M parameters, 15.7 GMACs counted here, 224 px). The published value
    is the better one of the averaged and the trained weights; here the averaged ones are
    validated. The authors train in float16: --amp.
Hardware: 8 GPUs x 128 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr.
Duration: not measured here.
Expected: 84.2 % top-1 (published); not measured here yet.
Command: bash tools/dist_train.sh configs/vig/vig-h-base_8xb128-300e_in1k.py 8 --amp
"""

_base_ = '../_base_/recipes/in1k_300e.py'

model = dict(
    backbone=dict(type='linvis.ViGHierarchical', arch='base', drop_path_rate=0.6),
    head=dict(in_channels=1024),
)
