"""Mask R-CNN with VRWKV-T and the simple feature pyramid on COCO, by the authors' recipe.

Reproduces: nothing published. The recipe is that of Vision-RWKV, table 3, VRWKV-T
    (41.7 box AP, 38.0 mask AP); there the backbone feeds a ViT-Adapter and FPN, here the simple
    feature pyramid.
Hardware: 8 GPUs x 2 pictures; with fewer GPUs keep 16 pictures in all, or scale the learning rate
    with --auto-scale-lr.
Duration: not measured here.
Expected: no published value for this neck; not measured here yet.
Command: bash tools/dist_train.sh configs/vrwkv/mask-rcnn_vrwkv-tiny_sfp_8xb2-1x_coco.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is an ImageNet-1k classifier, the authors' or one trained with
    vrwkv-tiny_16xb64-300e_in1k.py. Without these options training starts from random weights.
"""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        _delete_=True, type='linvis.VRWKV', arch='tiny', img_size=224, drop_path_rate=0.1
    ),
    neck=dict(
        _delete_=True,
        type='linvis.SimpleFeaturePyramid',
        in_channels=192,
        out_channels=256,
        num_outs=5,
        norm_cfg=dict(type='mmpretrain.LN2d'),
    ),
)

# 12 epochs with steps after 8 and 11, and 500 iterations of warm-up from 1e-3 of the rate, are
# those of the base. lr = 2e-4 for 8 x 2 = 16 pictures.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.01),
    constructor='linvis.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.85, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0
    ),
)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
