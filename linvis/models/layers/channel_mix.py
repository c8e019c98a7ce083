from __future__ import annotations

import torch
from torch import Tensor, nn

from linvis.models.layers.norm import LayerNorm
from linvis.models.layers.token_shift import mixing_ramp, shift_and_mix


class ChannelMix(nn.Module):
    """Feed-forward part of VRWKV: sigmoid(W_r x_r) * W_v norm(relu(W_k x_k)^2).

    x_k and x_r are x blended with its four neighbours by learnt weights; norm is a LayerNorm
    (`key_norm`) or nothing.

    Args:
        embed_dims: Channels C.
        layer_index: Index of this layer, from 0.
        depth: Number of layers of the backbone.
        hidden_rate: Hidden channels as a multiple of C.
        key_norm: Normalise the hidden channels.
        backend: Backend of the operators.

    Source:
        Vision-RWKV, arXiv:2403.02308, section 3.2.
    """

    def __init__(
        self,
        embed_dims: int,
        layer_index: int,
        depth: int,
        hidden_rate: int,
        key_norm: bool,
        backend: str,
    ) -> None:
        super().__init__()
        self.backend = backend
        ramp = mixing_ramp(embed_dims, 1 - layer_index / depth)
        self.spatial_mix_k = nn.Parameter(ramp.clone())
        self.spatial_mix_r = nn.Parameter(ramp.clone())

        hidden = hidden_rate * embed_dims
        self.key = nn.Linear(embed_dims, hidden, bias=False)
        self.key_norm = LayerNorm(hidden, cast_output=True) if key_norm else nn.Identity()
        self.receptance = nn.Linear(embed_dims, embed_dims, bias=False)
        self.value = nn.Linear(hidden, embed_dims, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix channels.

        Args:
            x: Tokens, shape (B, T, C).
            hw: Token grid (rows, columns), T = rows * columns.

        Returns:
            Shape (B, T, C).
        """
        x_k, x_r = shift_and_mix(x, hw, (self.spatial_mix_k, self.spatial_mix_r), self.backend)
        hidden = torch.relu(self.key(x_k))
        if isinstance(self.key_norm, nn.Identity):
            # not square(), which autocast would compute, write and read in float32
            hidden = hidden * hidden
        else:
            # in float32 under autocast, as the norm: squares may exceed the range of float16
            hidden = self.key_norm(hidden.square())
        return torch.sigmoid(self.receptance(x_r)) * self.value(hidden)
