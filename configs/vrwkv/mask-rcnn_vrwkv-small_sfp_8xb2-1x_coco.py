"""Mask R-CNN with VRWKV-S and the simple feature pyramid on COCO, by the authors' recipe.

Reproduces: nothing published. The recipe is that of Vision-RWKV, table 3, VRWKV-S
    (44.8 box AP, 40.2 mask AP); there the backbone feeds a ViT-Adapter and FPN, here the simple
    feature pyramid.
Hardware: 8 GPUs x 2 pictures; with fewer GPUs keep 16 pictures in all, or scale the learning rate
    with --auto-scale-lr.
Duration: not measured here.
Expected: no published value for this neck; not measured here yet.
Command: bash tools/dist_train.sh configs/vrwkv/mask-rcnn_vrwkv-small_sfp_8xb2-1x_coco.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is an ImageNet-1k classifier, the authors' or one trained with
    vrwkv-small_16xb64-300e_in1k.py. Without these options training starts from random weights.
"""

_base_ = './mask-rcnn_vrwkv-tiny_sfp_8xb2-1x_coco.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.2), neck=dict(in_channels=384))

# For 8 x 2 = 16 pictures.
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
