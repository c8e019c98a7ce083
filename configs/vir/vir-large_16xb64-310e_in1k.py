"""ViR-L/16 on ImageNet-1k, class token and causal decay over rows and columns.

Reproduces: ViR, ViR-L/16 (304.4 M parameters, 60.9 GMACs counted here, 224 px) with the authors'
    recipe as far as it is known, see _base_/in1k_310e.py. They have published no weights; the
    paper's accuracies are not quoted, as we could not check them.
    Decay along the sequence, as in their published code: --cfg-options model.backbone.retention=1d.
    For dense prediction train with model.backbone.direction=bidirectional and
    model.backbone.head_norm=True.
Hardware: 16 GPUs x 64 pictures; with fewer GPUs keep 1,024 pictures in all, or scale the learning
    rate with --auto-scale-lr. Mixed precision: --amp --cfg-options optim_wrapper.dtype=bfloat16.
Duration: not measured here.
Expected: not measured here yet; there is no value to compare with.
Command: sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8
    tools/slurm_train.sh configs/vir/vir-large_16xb64-310e_in1k.py
"""

_base_ = './_base_/in1k_310e.py'

model = dict(
    backbone=dict(arch='large', retention='2d', direction='causal', drop_path_rate=0.2),
    head=dict(in_channels=1024),
)

train_dataloader = dict(batch_size=64, num_workers=5)
