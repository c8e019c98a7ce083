"""UperNet with ViR-B/16 and the simple feature pyramid on ADE20K, by a recipe of ours.

Reproduces: nothing published. The authors of ViR have published neither code nor weights for
    segmentation; the recipe is ours: schedule of Swin Transformer; learning rate, weight decay
    and layer-wise decay of learning rates after Vim, which trains 32 crops with 1e-4 and has twice
    as many layers, of 0.92 each.
    Retention goes in both directions, over rows and columns, with a norm of each head behind it.
    Mixed precision: --amp --cfg-options optim_wrapper.dtype=bfloat16.
Hardware: 8 GPUs x 2 crops; with fewer GPUs keep 16 crops in all, or scale the learning rate with
    --auto-scale-lr.
Duration: unknown, not measured here.
Expected: not measured here yet; there is no value to compare with.
Command: bash tools/dist_train.sh configs/vir/upernet_vir-base_sfp_8xb2-160k_ade20k-512x512.py 8
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is a classifier trained with vir-base_16xb64-310e_in1k.py and
    --cfg-options model.backbone.direction=bidirectional model.backbone.head_norm=True: weights of
    the causal form load as well, but they have learnt to see only what is to the left and above,
    and without the norm.
    Without these options training starts from random weights.
"""

_base_ = './upernet_vir-small_sfp_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.3), neck=dict(in_channels=768))
