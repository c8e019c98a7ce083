"""UperNet with hybrid ViR-S on ADE20K, by a recipe of ours.

Reproduces: nothing published. The paper names hybrids without saying how they are built; network
    and recipe are ours, the recipe that of Swin Transformer.
    Mixed precision: --amp --cfg-options optim_wrapper.dtype=bfloat16.
Hardware: 8 GPUs x 2 crops; with fewer GPUs keep 16 crops in all, or scale the learning rate with
    --auto-scale-lr.
Duration: unknown, not measured here.
Expected: not measured here yet; there is no value to compare with.
Command: bash tools/dist_train.sh configs/vir/upernet_vir-hybrid-small_8xb2-160k_ade20k-512x512.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is a classifier trained with vir-hybrid-small_8xb128-300e_in1k.py.
    Without these options training starts from random weights.
"""

_base_ = './upernet_vir-hybrid-tiny_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='small'),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
