from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from linvis.models.backbones.arch import check_backend, drop_path_rates, settings_of
from linvis.models.backbones.hierarchical_backbone import HierarchicalBackbone, widths
from linvis.models.layers.conv_block import ConvBlock
from linvis.models.layers.mlp import mlp
from linvis.models.layers.norm import LayerNorm
from linvis.models.layers.pre_norm_block import PreNormBlock
from linvis.models.layers.retention import Retention
from linvis.registry import MODELS

EPS = 1e-6
CONV_STAGES = 2
REQUIRED_SETTINGS = ('embed_dims', 'depths', 'num_heads')


@MODELS.register_module()
class HybridViR(HierarchicalBackbone):
    """Hybrid ViR: two stages of convolutions, then two of retention, of strides 4, 8, 16 and 32.

    | arch  | embed_dims | depths       | num_heads |
    |-------|------------|--------------|-----------|
    | tiny  | 80         | 1, 3, 7, 4   | 10, 20    |
    | small | 96         | 2, 3, 10, 5  | 12, 24    |
    | base  | 128        | 2, 3, 12, 5  | 16, 32    |

    The paper names hybrids without saying how they are built: this design is ours. Convolutions
    find local patterns where a picture has most positions; retention in both dimensions and both
    directions relates everything where it has fewer. Blocks of convolutions are `ConvBlock`; those
    of retention have heads of 32 channels and the channel mixer of ViR. There is no position
    embedding and no class token: convolutions and decays tell places apart.

    Args:
        arch: Name from the table, or a dict with 'embed_dims' (of the first stage), 'depths' (of
            all stages) and 'num_heads' (of those after the first two).
        retention: Decay '1d' along the sequence, or '2d' over rows and columns.
        direction: 'bidirectional' or 'causal'.
        head_norm: Normalise each head behind the operator, as RetNet does.
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
        ValueError: If arch is unknown or incomplete, has no stage of retention or not as many heads
            as such stages, if there is no such decay, direction or backend, or as for
            `HierarchicalBackbone`.

    Source:
        ViR: Towards Efficient Vision Retention Backbones, arXiv:2310.19731, for the idea.
    """

    archs: Mapping[str, Mapping[str, Any]] = {
        'tiny': {'embed_dims': 80, 'depths': (1, 3, 7, 4), 'num_heads': (10, 20)},
        'small': {'embed_dims': 96, 'depths': (2, 3, 10, 5), 'num_heads': (12, 24)},
        'base': {'embed_dims': 128, 'depths': (2, 3, 12, 5), 'num_heads': (16, 32)},
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        *,
        retention: str = '2d',
        direction: str = 'bidirectional',
        head_norm: bool = True,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'featmap',
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str = 'auto',
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        check_backend(backend, ('retention',))
        settings = settings_of(arch, self.archs, REQUIRED_SETTINGS, {})
        depths, num_heads = tuple(settings['depths']), tuple(settings['num_heads'])
        if len(depths) < 3 or len(num_heads) != len(depths) - CONV_STAGES:
            raise ValueError(
                'An arch needs the depths of at least three stages and the heads of those after '
                f'the first two, got depths {depths} and num_heads {num_heads}.'
            )
        embed_dims = settings['embed_dims']
        dims = widths(embed_dims, depths)
        drops = iter(drop_path_rates(drop_path_rate, sum(depths)))
        conv_stages = [
            [ConvBlock(channels, next(drops)) for _ in range(depth)]
            for channels, depth in zip(dims[:CONV_STAGES], depths, strict=False)
        ]
        retention_stages = [
            [
                PreNormBlock(
                    next(drops),
                    norm1=LayerNorm(channels, EPS, cast_output=True),
                    retention=Retention(
                        channels,
                        heads,
                        decay=retention,
                        direction=direction,
                        head_norm=head_norm,
                        backend=backend,
                    ),
                    norm2=LayerNorm(channels, EPS, cast_output=True),
                    mlp=mlp(channels),
                )
                for _ in range(depth)
            ]
            for channels, depth, heads in zip(
                dims[CONV_STAGES:], depths[CONV_STAGES:], num_heads, strict=True
            )
        ]
        super().__init__(
            in_channels=in_channels,
            embed_dims=embed_dims,
            stages=[*conv_stages, *retention_stages],
            out_indices=out_indices,
            out_type=out_type,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
