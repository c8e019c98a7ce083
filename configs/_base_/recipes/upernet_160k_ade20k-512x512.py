"""UperNet on ADE20K for 160,000 iterations with AdamW, as hierarchical transformers are trained.

The backbone is still that of the library, a ResNet-50.
"""

_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    '../datasets/ade20k_512x512.py',
    'mmseg::_base_/schedules/schedule_160k.py',
    '../runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)

train_dataloader = dict(batch_size=2)

# For 8 x 2 = 16 crops. The default constructor does not know RMSNorm for a norm, hence
# flat_decay_mult.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
auto_scale_lr = dict(enable=False, base_batch_size=8 * 2)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='mIoU'))
