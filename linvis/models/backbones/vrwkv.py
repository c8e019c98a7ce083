from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linvis.models.backbones.arch import check_backend, drop_path_rates, settings_of
from linvis.models.backbones.token_backbone import TokenBackbone
from linvis.models.layers.block import MixerBlock
from linvis.models.layers.channel_mix import ChannelMix
from linvis.models.layers.norm import LayerNorm
from linvis.models.layers.patch_embed import PatchEmbed
from linvis.models.layers.spatial_mix import SpatialMix
from linvis.registry import MODELS

HIDDEN_RATE = 4
REQUIRED_SETTINGS = ('embed_dims', 'depth')
OPTIONAL_SETTINGS: dict[str, Any] = {
    'post_norm': False,
    'layer_scale_init': None,
    'key_norm': False,
}


@MODELS.register_module()
class VRWKV(TokenBackbone):
    """Vision-RWKV, a plain backbone whose token mixer is the bidirectional WKV operator.

    | arch  | embed_dims | depth | post_norm | layer_scale_init | key_norm |
    |-------|------------|-------|-----------|------------------|----------|
    | tiny  | 192        | 12    | no        | none             | no       |
    | small | 384        | 12    | yes       | 1.0              | no       |
    | base  | 768        | 12    | yes       | 1e-5             | no       |
    | large | 1024       | 24    | yes       | 1e-5             | yes      |

    State dicts have the names of the authors' checkpoints without the prefix `backbone.`. What
    differs from the authors' code: the operator follows its definition, which their CUDA kernel
    approximates; a class of one backbone serves all tasks; `with_cp` recomputes whole layers.

    Args:
        arch: Name from the table, or a dict with 'embed_dims' and 'depth' and, if wanted,
            'post_norm' (False), 'layer_scale_init' (None) and 'key_norm' (False).
        img_size: Picture size, in pixels, that the position embedding is learnt for; others are
            resampled.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the pictures.
        out_indices: Index or indices of the layers to return; negative ones count from the end.
        out_type: 'featmap' (B, C, Hp, Wp), 'raw' (B, T, C) or 'avg_featmap' (B, C).
        drop_path_rate: Drop path of the last layer; it grows linearly from 0 at the first one.
        frozen_stages: Freeze the embeddings and this many layers; -1 freezes nothing.
        with_cp: Recompute the activations of each layer in the backward pass instead of keeping
            them.
        backend: Backend of the operators, see `linvis_ops.available_backends`.
        init_cfg: Initialisation of mmengine, usually of type 'Pretrained'.

    Raises:
        ValueError: If arch is unknown or incomplete, if there is no such backend, or as for
            `TokenBackbone`.

    Source:
        Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures,
        arXiv:2403.02308.
    """

    final_norm_name = 'ln1'

    archs: Mapping[str, Mapping[str, Any]] = {
        'tiny': {'embed_dims': 192, 'depth': 12},
        'small': {'embed_dims': 384, 'depth': 12, 'post_norm': True, 'layer_scale_init': 1.0},
        'base': {'embed_dims': 768, 'depth': 12, 'post_norm': True, 'layer_scale_init': 1e-5},
        'large': {
            'embed_dims': 1024,
            'depth': 24,
            'post_norm': True,
            'layer_scale_init': 1e-5,
            'key_norm': True,
        },
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'featmap',
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str = 'auto',
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        check_backend(backend, ('bi_wkv', 'q_shift'))
        settings = settings_of(arch, self.archs, REQUIRED_SETTINGS, OPTIONAL_SETTINGS)
        embed_dims, depth = settings['embed_dims'], settings['depth']
        key_norm = settings['key_norm']
        layers = [
            MixerBlock(
                embed_dims,
                SpatialMix(embed_dims, index, depth, key_norm, backend),
                ChannelMix(embed_dims, index, depth, HIDDEN_RATE, key_norm, backend),
                post_norm=settings['post_norm'],
                layer_scale_init=settings['layer_scale_init'],
                drop_path=drop,
                input_norm=index == 0,
            )
            for index, drop in enumerate(drop_path_rates(drop_path_rate, depth))
        ]
        super().__init__(
            patch_embed=PatchEmbed(in_channels, embed_dims, patch_size),
            layers=layers,
            final_norm=LayerNorm(embed_dims),
            img_size=img_size,
            embed_dims=embed_dims,
            out_indices=out_indices,
            out_type=out_type,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
