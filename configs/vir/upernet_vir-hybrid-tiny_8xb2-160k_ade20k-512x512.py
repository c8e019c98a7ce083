"""UperNet with hybrid ViR-T on ADE20K, by a recipe of ours.

Reproduces: nothing published. The paper names hybrids without saying how they are built; network
    and recipe are ours, the recipe that of Swin Transformer.
    Mixed precision: --amp --cfg-options optim_wrapper.dtype=bfloat16.
Hardware: 8 GPUs x 2 crops; with fewer GPUs keep 16 crops in all, or scale the learning rate with
    --auto-scale-lr.
Duration: unknown, not measured here.
Expected: not measured here yet; there is no value to compare with.
Command: bash tools/dist_train.sh configs/vir/upernet_vir-hybrid-tiny_8xb2-160k_ade20k-512x512.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is a classifier trained with vir-hybrid-tiny_8xb128-300e_in1k.py.
    Without these options training starts from random weights.
"""

_base_ = '../_base_/recipes/upernet_160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='linvis.HybridViR',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
