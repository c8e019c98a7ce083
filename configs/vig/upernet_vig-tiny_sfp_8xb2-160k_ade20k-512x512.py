"""UperNet with ViG-T and the simple feature pyramid on ADE20K, by a recipe of ours.

Reproduces: nothing published. The authors of ViG have published nothing for
    segmentation; the recipe is ours: schedule of Swin Transformer; learning rate, weight decay and
    layer-wise decay of learning rates after Vim, which trains 32 crops with 1e-4 and has twice as
    many layers, of 0.92 each.
    Train in float32 or bfloat16, not in float16, see docs/models/vig.md.
Hardware: 8 GPUs x 2 crops; with fewer GPUs keep 16 crops in all, or scale the learning rate with
    --auto-scale-lr.
Duration: unknown, not measured here.
Expected: no published value; not measured here yet. Top-1 on ImageNet-1k of the classifier that
    training starts from: 77.2 % (published).
Command: bash tools/dist_train.sh
    configs/vig/upernet_vig-tiny_sfp_8xb2-160k_ade20k-512x512.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is an ImageNet-1k classifier, the authors' or one trained with
    vig-tiny_8xb128-300e_in1k.py. Without these options training starts from random weights.
"""

_base_ = '../_base_/recipes/upernet_sfp_160k_ade20k-512x512.py'

model = dict(
    backbone=dict(_delete_=True, type='linvis.ViG', arch='tiny', img_size=224, drop_path_rate=0.1),
    neck=dict(in_channels=192),
)
