"""UperNet with ViG-H-T on ADE20K, by a recipe of ours.

Reproduces: nothing published. The authors of ViG have published nothing for
    segmentation; the recipe is ours: that of Swin Transformer.
Hardware: 8 GPUs x 2 crops; with fewer GPUs keep 16 crops in all, or scale the learning rate with
    --auto-scale-lr.
Duration: unknown, not measured here.
Expected: no published value; not measured here yet. Top-1 on ImageNet-1k of the classifier that
    training starts from: 82.8 % (published).
Command: bash tools/dist_train.sh
    configs/vig/upernet_vig-h-tiny_8xb2-160k_ade20k-512x512.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is an ImageNet-1k classifier, the authors' or one trained with
    vig-h-tiny_8xb128-300e_in1k.py. Without these options training starts from random weights.
"""

_base_ = '../_base_/recipes/upernet_160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='linvis.ViGHierarchical',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
