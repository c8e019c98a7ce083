"""UperNet with VRWKV-S and the simple feature pyramid on ADE20K, by the authors' recipe.

Reproduces: nothing published. The recipe is that of Vision-RWKV, table 4, VRWKV-S
    (47.2 mIoU); there a ViT-Adapter makes the four maps, here the simple feature pyramid. The
    authors train in fp16: add --amp.
Hardware: 8 GPUs x 2 crops; with fewer GPUs keep 16 crops in all, or scale the learning rate with
    --auto-scale-lr.
Duration: not measured here.
Expected: no published value for this neck; not measured here yet.
Command: bash tools/dist_train.sh
    configs/vrwkv/upernet_vrwkv-small_sfp_8xb2-160k_ade20k-512x512.py 8 --amp
    --cfg-options model.backbone.init_cfg.type=Pretrained
    model.backbone.init_cfg.checkpoint=CHECKPOINT model.backbone.init_cfg.prefix=backbone.
    where CHECKPOINT is an ImageNet-1k classifier, the authors' or one trained with
    vrwkv-small_16xb64-300e_in1k.py. Without these options training starts from random weights.
"""

_base_ = './upernet_vrwkv-tiny_sfp_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.2), neck=dict(in_channels=384))

# lr = 6e-5 for 8 x 2 = 16 crops.
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.85))
