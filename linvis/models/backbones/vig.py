from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from linvis.models.backbones.arch import check_backend, drop_path_rates, settings_of
from linvis.models.backbones.token_backbone import TokenBackbone
from linvis.models.layers.gated_linear_attention import GatedLinearAttention
from linvis.models.layers.norm import RMSNorm
from linvis.models.layers.patch_embed import ConvPatchEmbed
from linvis.models.layers.pre_norm_block import PreNormBlock
from linvis.models.layers.swiglu import SwiGLU
from linvis.registry import MODELS

HIDDEN_MULTIPLE = 256
REQUIRED_SETTINGS = ('embed_dims', 'depth', 'num_heads')
OPTIONAL_SETTINGS: dict[str, Any] = {'conv_act': False, 'out_act': False}


@MODELS.register_module()
class ViG(TokenBackbone):
    """ViG, a plain backbone whose token mixer is bidirectional gated linear attention.

    | arch  | embed_dims | depth | num_heads | conv_act | out_act |
    |-------|------------|-------|-----------|----------|---------|
    | tiny  | 192        | 12    | 3         | yes      | yes     |
    | small | 384        | 12    | 6         | no       | no      |
    | base  | 768        | 12    | 12        | no       | no      |

    State dicts have the names of the authors' checkpoints; `linvis.utils.checkpoint` separates
    their heads. What differs from the authors' code: evaluation is the function that was trained,
    where theirs halves the output of the operator; pictures are padded to whole patches. Not to be
    confused with mmpretrain's `Vig`, a graph network.

    Args:
        arch: Name from the table, or a dict with 'embed_dims', 'depth' and 'num_heads' and, if
            wanted, 'conv_act' (False) and 'out_act' (False): SiLU on the local branch and before
            the last projection of a token mixer.
        img_size: Picture size, in pixels, that the position embedding is learnt for; others are
            resampled.
        patch_size: Side of a patch in pixels, an even number from 4 on.
        in_channels: Channels of the pictures.
        out_indices: Index or indices of the layers to return; negative ones count from the end.
        out_type: 'featmap' (B, C, Hp, Wp), 'raw' (B, T, C) or 'avg_featmap' (B, C).
        drop_path_rate: Drop path of the last layer; it grows linearly from 0 at the first one.
        frozen_stages: Freeze the embeddings and this many layers; -1 freezes nothing.
        with_cp: Recompute the activations of each layer in the backward pass instead of keeping
            them.
        backend: Backend of the operator, see `linvis_ops.available_backends`.
        init_cfg: Initialisation of mmengine, usually of type 'Pretrained'.

    Raises:
        ValueError: If arch is unknown or incomplete, if there is no such backend, or as for
            `TokenBackbone`.

    Source:
        ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention,
        arXiv:2405.18425.
    """

    layers_name = 'blocks'
    final_norm_name = 'norm'

    archs: Mapping[str, Mapping[str, Any]] = {
        'tiny': {
            'embed_dims': 192,
            'depth': 12,
            'num_heads': 3,
            'conv_act': True,
            'out_act': True,
        },
        'small': {'embed_dims': 384, 'depth': 12, 'num_heads': 6},
        'base': {'embed_dims': 768, 'depth': 12, 'num_heads': 12},
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
        check_backend(backend, ('bi_gla',))
        settings = settings_of(arch, self.archs, REQUIRED_SETTINGS, OPTIONAL_SETTINGS)
        embed_dims, depth = settings['embed_dims'], settings['depth']
        blocks = [
            PreNormBlock(
                drop,
                attn_norm=RMSNorm(embed_dims, cast_output=True),
                attn=GatedLinearAttention(
                    embed_dims,
                    settings['num_heads'],
                    conv_act=settings['conv_act'],
                    out_act=settings['out_act'],
                    backend=backend,
                ),
                mlp_norm=RMSNorm(embed_dims, cast_output=True),
                mlp=SwiGLU(embed_dims, HIDDEN_MULTIPLE, ('gate_proj', 'down_proj')),
            )
            for drop in drop_path_rates(drop_path_rate, depth)
        ]
        super().__init__(
            patch_embed=ConvPatchEmbed(in_channels, embed_dims, patch_size),
            layers=blocks,
            final_norm=RMSNorm(embed_dims),
            img_size=img_size,
            embed_dims=embed_dims,
            out_indices=out_indices,
            out_type=out_type,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]  # under the authors' name
        """The layers, each called with (tokens, hw)."""
        return self.blocks
