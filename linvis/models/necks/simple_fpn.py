from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from linvis.registry import MODELS

SCALES = (4.0, 2.0, 1.0, 0.5)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Pyramid of strides 4, 8, 16 and 32 from the one stride-16 map of a plain backbone.

    Each level is made from the same map: two, one or no transposed convolution of stride 2, or max
    pooling; then a 1x1 and a 3x3 convolution.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of every level.
        num_outs: Number of levels. Levels beyond the fourth halve the one before by max pooling
            (stride 64 and on), as Mask R-CNN wants for its proposals.
        norm_cfg: Norm after each convolution, as for `mmcv.cnn.build_norm_layer`, or None for no
            norm. The paper's layer norm over channels is dict(type='mmpretrain.LN2d').
        init_cfg: Initialisation of mmengine.

    Raises:
        ValueError: If num_outs is less than 4.

    Source:
        Exploring Plain Vision Transformer Backbones for Object Detection, arXiv:2203.16527.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_outs: int = 4,
        norm_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if num_outs < len(SCALES):
            raise ValueError(f'num_outs must be at least {len(SCALES)}, got {num_outs}.')
        self.in_channels = in_channels
        self.num_outs = num_outs
        self.levels = nn.ModuleList(
            _level(scale, in_channels, out_channels, norm_cfg) for scale in SCALES
        )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Build the pyramid.

        Args:
            inputs: The map (B, in_channels, Hp, Wp), alone or as the only entry of a sequence, as
                backbones return it.

        Returns:
            num_outs maps (B, out_channels, ...), from the finest to the coarsest.

        Raises:
            ValueError: If there is more than one map or its channels are not in_channels.
        """
        maps = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if len(maps) != 1 or maps[0].ndim != 4 or maps[0].shape[1] != self.in_channels:
            raise ValueError(
                f'SimpleFeaturePyramid takes one map (B, {self.in_channels}, H, W), got '
                f'{[tuple(x.shape) for x in maps]}; set out_indices and in_channels accordingly.'
            )
        outputs = [level(maps[0]) for level in self.levels]
        for _ in range(self.num_outs - len(SCALES)):
            outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return tuple(outputs)


def _level(
    scale: float, in_channels: int, out_channels: int, norm_cfg: dict[str, Any] | None
) -> nn.Sequential:
    """Resample by scale, then project."""
    steps: list[nn.Module] = []
    channels = in_channels
    if scale == 0.5:
        # A map of one row or column stays one, where plain floor division would leave nothing.
        steps.append(nn.MaxPool2d(2, ceil_mode=True))
    while scale > 1:
        if steps:
            if norm_cfg is not None:
                steps.append(build_norm_layer(norm_cfg, channels)[1])
            steps.append(nn.GELU())
        steps.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
        scale /= 2
    for kernel_size in (1, 3):
        steps.append(
            ConvModule(
                channels,
                out_channels,
                kernel_size,
                padding=kernel_size // 2,
                norm_cfg=norm_cfg,
                act_cfg=None,
            )
        )
        channels = out_channels
    return nn.Sequential(*steps)
