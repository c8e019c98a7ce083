"""UperNet with hybrid ViR-B on ADE20K, by a recipe of ours.

Reproduces: nothing published. The paper names hybrids without saying how they are built; network
    and recipe are ours, the recipe that of Swin Transformer.
    Mixed precision: --amp --cfg-options optim_wrapper.dtype=bfloat16.
Hardware: 8 GPUs x 2 crops; with fewer GPUs keep 16 crops in all, or scale the learning rate with
    --auto-scale-lr.
Duration: unknown, not measured here.
Expected: not measured here yet; there is no value to compare with.
Command: bash tools/dist_train.sh configs/vir/upernet_vir-hybrid-base_8xb2-160k_ade20k-512x512.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is a classifier trained with vir-hybrid-base_8xb128-300e_in1k.py.
    Without these options training starts from random weights.
"""

_base_ = './upernet_vir-hybrid-tiny_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='base'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
