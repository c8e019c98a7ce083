"""VRWKV-B on ImageNet-1k: 82.0 % top-1 published by the authors, with their recipe.

Reproduces: Vision-RWKV, table 2, VRWKV-B (93.7 M parameters, 18.2 GFLOPs, 224 px).
Hardware: 16 GPUs x 64 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr.
Duration: not measured here.
Expected: 82.0 % top-1 (published); not measured here yet.
Command: sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8
    tools/slurm_train.sh configs/vrwkv/vrwkv-base_16xb64-300e_in1k.py
"""

_base_ = './vrwkv-tiny_16xb64-300e_in1k.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5),
    head=dict(in_channels=768),
    # One of the two for each batch, with equal chances.
    train_cfg=dict(
        augments=[
            dict(type='mmpretrain.Mixup', alpha=0.8),
            dict(type='mmpretrain.CutMix', alpha=1.0),
        ],
    ),
)
