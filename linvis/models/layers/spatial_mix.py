from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linvis.models.layers.norm import LayerNorm
from linvis.models.layers.token_shift import mixing_ramp, shift_and_mix
from linvis_ops import bi_wkv


class SpatialMix(nn.Module):
    """Token mixer of VRWKV: gated bidirectional WKV over tokens blended with their neighbours.

    out = W_o(sigmoid(W_r x_r) * norm(bi_wkv(decay / T, bonus / T, W_k x_k, W_v x_v))), where x_k,
    x_v and x_r are x blended with its four neighbours by three learnt weights and norm is a
    LayerNorm (`key_norm`) or nothing.

    Decay, bonus and blending weights start graded over the channels and the depth: early channels
    attend widely and late ones narrowly, more channels widely in deeper layers. Projections have
    PyTorch's default initial values.

    Args:
        embed_dims: Channels C.
        layer_index: Index of this layer, from 0.
        depth: Number of layers of the backbone.
        key_norm: Normalise the output of the operator.
        backend: Backend of the operators.

    Source:
        Vision-RWKV, arXiv:2403.02308, equations 5 to 9.
    """

    def __init__(
        self, embed_dims: int, layer_index: int, depth: int, key_norm: bool, backend: str
    ) -> None:
        super().__init__()
        self.backend = backend
        relative_depth = layer_index / max(depth - 1, 1)
        remaining_depth = 1 - layer_index / depth
        channel = torch.arange(embed_dims)

        decay = (channel / max(embed_dims - 1, 1)).pow(0.7 + 1.3 * relative_depth)
        self.spatial_decay = nn.Parameter(8 * decay - 5)
        self.spatial_first = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        ramp = mixing_ramp(embed_dims, remaining_depth)
        self.spatial_mix_k = nn.Parameter(ramp.clone())
        self.spatial_mix_v = nn.Parameter(ramp + 0.3 * relative_depth)
        self.spatial_mix_r = nn.Parameter(mixing_ramp(embed_dims, 0.5 * remaining_depth))

        self.key = nn.Linear(embed_dims, embed_dims, bias=False)
        self.value = nn.Linear(embed_dims, embed_dims, bias=False)
        self.receptance = nn.Linear(embed_dims, embed_dims, bias=False)
        self.key_norm = LayerNorm(embed_dims, cast_output=True) if key_norm else nn.Identity()
        self.output = nn.Linear(embed_dims, embed_dims, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix tokens.

        Args:
            x: Tokens, shape (B, T, C).
            hw: Token grid (rows, columns), T = rows * columns.

        Returns:
            Shape (B, T, C).
        """
        x_k, x_v, x_r = shift_and_mix(
            x, hw, (self.spatial_mix_k, self.spatial_mix_v, self.spatial_mix_r), self.backend
        )
        # Divided by T these are small numbers: float32 even in a model of lower precision.
        wide = torch.promote_types(torch.float32, x.dtype)
        decay = self.spatial_decay.to(wide) / x.shape[1]
        bonus = self.spatial_first.to(wide) / x.shape[1]
        wkv = bi_wkv(decay, bonus, self.key(x_k), self.value(x_v), backend=self.backend)
        return self.output(torch.sigmoid(self.receptance(x_r)) * self.key_norm(wkv))
