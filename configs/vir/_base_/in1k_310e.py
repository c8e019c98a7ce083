"""ImageNet-1k as the authors of ViR train it, as far as that is known, without the network.

Their training program has these values as its defaults: 310 epochs of which the last 10 stay at the
smallest rate, AdamW, 1e-3, weight decay 0.05, norm of gradients at most 5, RandAugment, random
erasing, Mixup or CutMix, label smoothing 0.1; the command in their README adds averaged weights.

Not known: how many pictures a batch has in all (128 for each process; 1,024 here), whether the
paper's networks were trained with these defaults (an example command has 5e-3 for one process), and
the shape of the schedule between its ends (that module is missing; a cosine here).

Not the same here: pictures are normalised as in the other configs, not with mean and deviation 0.5.
Drop path 0.2 is in the example command, but their program does not pass it on to the network.
Colour jitter 0.4 is among their options; beside RandAugment timm does not apply it.
"""

_base_ = '../../_base_/recipes/in1k_300e.py'

# The class token goes to the head as it is.
model = dict(backbone=dict(type='linvis.ViR', img_size=224, out_type='cls_token'), neck=None)

# The authors do not decay these two either.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={'pos_embed': dict(decay_mult=0.0), 'cls_token': dict(decay_mult=0.0)}
    ),
)
# Warm-up from 1e-6, at a rate of 1e-3; the cosine to 5e-6 at epoch 300, and that until the end.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=5e-6,
        by_epoch=True,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=310)

# Averaged weights with a decay of 0.9998; these are validated and tested.
custom_hooks = [dict(type='mmpretrain.EMAHook', momentum=2e-4, priority='ABOVE_NORMAL')]
