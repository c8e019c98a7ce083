from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linvis.models.backbones.arch import check_backend, drop_path_rates, settings_of
from linvis.models.backbones.hierarchical_backbone import HierarchicalBackbone, widths
from linvis.models.layers.gated_linear_attention import GatedLinearAttention
from linvis.models.layers.norm import LayerNorm
from linvis.models.layers.pre_norm_block import PreNormBlock
from linvis.models.layers.swiglu import SwiGLU
from linvis.registry import MODELS

HIDDEN_MULTIPLE = 32
REQUIRED_SETTINGS = ('embed_dims', 'depths', 'num_heads')


@MODELS.register_module()
class ViGHierarchical(HierarchicalBackbone):
    """ViG-H: four stages of bidirectional gated linear attention, of strides 4, 8, 16 and 32.

    | arch  | embed_dims | depths      | num_heads     |
    |-------|------------|-------------|---------------|
    | tiny  | 96         | 2, 2, 5, 2  | 3, 6, 12, 24  |
    | small | 96         | 2, 2, 17, 2 | 3, 6, 12, 24  |
    | base  | 128        | 2, 2, 17, 2 | 4, 8, 16, 32  |

    State dicts have the names of the authors' checkpoints; their classifier's norm is the norm of
    the last stage here, see `linvis.utils.checkpoint`.

    Args:
        arch: Name from the table, or a dict with 'embed_dims' (of the first stage), 'depths' and
            'num_heads' (of each stage).
        in_channels: Channels of the pictures.
        out_indices: Index or indices of the stages to return; negative ones count from the end.
        out_type: 'featmap' (B, C, Hp, Wp), 'raw' (B, T, C) or 'avg_featmap' (B, C).
        drop_path_rate: Drop path of the last block; it grows linearly from 0 at the first one.
        frozen_stages: Freeze the stem and this many stages; -1 freezes nothing.
        with_cp: Recompute the activations of each block in the backward pass instead of keeping
            them.
        backend: Backend of the operator, see `linvis_ops.available_backends`.
        init_cfg: Initialisation of mmengine, usually of type 'Pretrained'.

    Raises:
        ValueError: If arch is unknown, incomplete or has not as many heads as depths, if there is
            no such backend, or as for `HierarchicalBackbone`.

    Source:
        ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention,
        arXiv:2405.18425.
    """

    archs: Mapping[str, Mapping[str, Any]] = {
        'tiny': {'embed_dims': 96, 'depths': (2, 2, 5, 2), 'num_heads': (3, 6, 12, 24)},
        'small': {'embed_dims': 96, 'depths': (2, 2, 17, 2), 'num_heads': (3, 6, 12, 24)},
        'base': {'embed_dims': 128, 'depths': (2, 2, 17, 2), 'num_heads': (4, 8, 16, 32)},
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        *,
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
        settings = settings_of(arch, self.archs, REQUIRED_SETTINGS, {})
        depths, num_heads = tuple(settings['depths']), tuple(settings['num_heads'])
        if not depths or len(depths) != len(num_heads):
            raise ValueError(
                'An arch needs the depth and the heads of at least one stage, as many of both, got '
                f'depths {depths} and num_heads {num_heads}.'
            )
        embed_dims = settings['embed_dims']
        drops = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = [
            [
                PreNormBlock(
                    next(drops),
                    norm=LayerNorm(dims, cast_output=True),
                    op=GatedLinearAttention(
                        dims, heads, conv_act=False, out_act=False, backend=backend
                    ),
                    norm2=LayerNorm(dims, cast_output=True),
                    mlp=SwiGLU(dims, HIDDEN_MULTIPLE, ('fc1', 'fc2')),
                )
                for _ in range(depth)
            ]
            for dims, heads, depth in zip(
                widths(embed_dims, depths), num_heads, depths, strict=True
            )
        ]
        super().__init__(
            in_channels=in_channels,
            embed_dims=embed_dims,
            stages=stages,
            out_indices=out_indices,
            out_type=out_type,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
