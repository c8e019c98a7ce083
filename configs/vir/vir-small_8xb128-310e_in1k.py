"""ViR-S/16 on ImageNet-1k, class token and causal decay over rows and columns.

Reproduces: ViR, ViR-S/16 (22.1 M parameters, 4.5 GMACs counted here, 224 px) with the authors'
    recipe as far as it is known, see _base_/in1k_310e.py. They have published no weights; the
    paper's accuracies are not quoted, as we could not check them.
    Decay along the sequence, as in their published code: --cfg-options model.backbone.retention=1d.
    For dense prediction train with model.backbone.direction=bidirectional and
    model.backbone.head_norm=True.
Hardware: 8 GPUs x 128 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr. Mixed precision: --amp --cfg-options optim_wrapper.dtype=bfloat16.
Duration: not measured here.
Expected: not measured here yet; there is no value to compare with.
Command: bash tools/dist_train.sh configs/vir/vir-small_8xb128-310e_in1k.py 8
"""

_base_ = './_base_/in1k_310e.py'

model = dict(
    backbone=dict(arch='small', retention='2d', direction='causal', drop_path_rate=0.2),
    head=dict(in_channels=384),
)
