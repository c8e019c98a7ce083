"""UperNet with VRWKV-T and the simple feature pyramid on ADE20K, by the authors' recipe.

Reproduces: nothing published. The recipe is that of Vision-RWKV, table 4, VRWKV-T
    (43.3 mIoU); there a ViT-Adapter makes the four maps, here the simple feature pyramid. The
    authors train in fp16: add --amp.
Hardware: 8 GPUs x 2 crops; with fewer GPUs keep 16 crops in all, or scale the learning rate with
    --auto-scale-lr.
Duration: not measured here.
Expected: no published value for this neck; not measured here yet.
Command: bash tools/dist_train.sh
    configs/vrwkv/upernet_vrwkv-tiny_sfp_8xb2-160k_ade20k-512x512.py 8 --amp
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is an ImageNet-1k classifier, the authors' or one trained with
    vrwkv-tiny_16xb64-300e_in1k.py. Without these options training starts from random weights.
"""

_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    '../_base_/datasets/ade20k_512x512.py',
    'mmseg::_base_/schedules/schedule_160k.py',
    '../_base_/runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True, type='linvis.VRWKV', arch='tiny', img_size=224, drop_path_rate=0.1
    ),
    neck=dict(
        type='linvis.SimpleFeaturePyramid',
        in_channels=192,
        out_channels=256,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
    ),
    decode_head=dict(in_channels=[256, 256, 256, 256], num_classes=150),
    auxiliary_head=dict(in_channels=256, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)

train_dataloader = dict(batch_size=2)

# lr = 1.2e-4 for 8 x 2 = 16 crops.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1.2e-4, betas=(0.9, 0.999), weight_decay=0.01),
    constructor='linvis.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.95, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
auto_scale_lr = dict(enable=False, base_batch_size=8 * 2)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='mIoU'))
