"""VRWKV-T on ImageNet-1k: 75.1 % top-1 published by the authors, with their recipe.

Reproduces: Vision-RWKV, table 2, VRWKV-T (6.2 M parameters, 1.2 GFLOPs, 224 px).
Hardware: 16 GPUs x 64 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr.
Duration: not measured here; the authors: a bit over two days on 8 A100.
Expected: 75.1 % top-1 (published); not measured here yet.
Command: sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8
    tools/slurm_train.sh configs/vrwkv/vrwkv-tiny_16xb64-300e_in1k.py
"""

_base_ = [
    '../_base_/datasets/imagenet_bs64_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    type='mmpretrain.ImageClassifier',
    backbone=dict(type='linvis.VRWKV', arch='tiny', img_size=224),
    neck=dict(type='mmpretrain.GlobalAveragePooling'),
    head=dict(
        type='mmpretrain.LinearClsHead',
        num_classes=1000,
        in_channels=192,
        loss=dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

# AdamW, weight decay 0.05, 20 epochs of warm-up from 1e-3 of the rate and cosine decay to 1 % are
# those of the base; lr = 5e-4 per 512 pictures x 1,024 pictures.
optim_wrapper = dict(
    optimizer=dict(lr=5e-4 * 1024 / 512),
    # The authors decay the position embedding, too, and spare norms and biases only.
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
