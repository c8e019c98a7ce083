"""Mask R-CNN with ViG-T and the simple feature pyramid on COCO, by a recipe of ours.

Reproduces: nothing published. The authors of ViG have published nothing for
    detection; the recipe is ours: that of Swin Transformer with the layer-wise decay of learning
    rates that Vision-RWKV has for plain backbones of 12 layers.
    Train in float32 or bfloat16, not in float16, see docs/models/vig.md.
Hardware: 8 GPUs x 2 pictures; with fewer GPUs keep 16 pictures in all, or scale the learning rate
    with --auto-scale-lr.
Duration: unknown, not measured here.
Expected: no published value; not measured here yet. Top-1 on ImageNet-1k of the classifier that
    training starts from: 77.2 % (published).
Command: bash tools/dist_train.sh configs/vig/mask-rcnn_vig-tiny_sfp_8xb2-1x_coco.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is an ImageNet-1k classifier, the authors' or one trained with
    vig-tiny_8xb128-300e_in1k.py. Without these options training starts from random weights.
"""

_base_ = '../_base_/recipes/mask-rcnn_sfp_1x_coco.py'

model = dict(
    backbone=dict(_delete_=True, type='linvis.ViG', arch='tiny', img_size=224, drop_path_rate=0.1),
    neck=dict(in_channels=192),
)
