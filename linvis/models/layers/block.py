from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from linvis.models.layers.norm import LayerNorm


class MixerBlock(nn.Module):
    """Residual layer of a token mixer and a channel mixer, with layer scale and drop path.

    x = x + drop_path(gamma1 * att(ln1(x))), or gamma1 * ln1(att(x)) with `post_norm`; the same
    with ln2, ffn and gamma2.

    Args:
        embed_dims: Channels C.
        att: Token mixer, called with (tokens, hw).
        ffn: Channel mixer, called with (tokens, hw).
        post_norm: Normalise the output of a mixer, still inside the residual branch, instead of
            its input.
        layer_scale_init: Initial value of gamma1 and gamma2, or None for no layer scale.
        drop_path: Probability that a sample skips a branch during training.
        input_norm: Normalise the input of the whole layer first (`ln0`).
    """

    def __init__(
        self,
        embed_dims: int,
        att: nn.Module,
        ffn: nn.Module,
        *,
        post_norm: bool,
        layer_scale_init: float | None,
        drop_path: float,
        input_norm: bool,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        if layer_scale_init is None:
            self.gamma1 = self.gamma2 = None
        else:
            self.gamma1 = nn.Parameter(torch.full((embed_dims,), layer_scale_init))
            self.gamma2 = nn.Parameter(torch.full((embed_dims,), layer_scale_init))
        self.ln0 = LayerNorm(embed_dims) if input_norm else nn.Identity()
        self.ln1 = LayerNorm(embed_dims, cast_output=True)
        self.ln2 = LayerNorm(embed_dims, cast_output=True)
        self.drop_path = StochasticDepth(drop_path, 'row')
        self.att = att
        self.ffn = ffn

    def _add_branch(
        self,
        x: Tensor,
        hw: tuple[int, int],
        norm: nn.Module,
        mixer: nn.Module,
        gamma: Tensor | None,
    ) -> Tensor:
        branch = norm(mixer(x, hw)) if self.post_norm else mixer(norm(x), hw)
        if gamma is None:
            return x + self.drop_path(branch)
        if self.training and self.drop_path.p > 0:
            # drop path scales samples as gamma does channels: one factor, one pass over tokens
            gamma = self.drop_path(gamma.expand(x.shape[0], 1, -1))  # (B, 1, C)
        return torch.addcmul(x, gamma, branch)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Apply the layer.

        Args:
            x: Tokens, shape (B, T, C).
            hw: Token grid (rows, columns), T = rows * columns.

        Returns:
            Shape (B, T, C).
        """
        x = self._add_branch(self.ln0(x), hw, self.ln1, self.att, self.gamma1)
        return self._add_branch(x, hw, self.ln2, self.ffn, self.gamma2)
