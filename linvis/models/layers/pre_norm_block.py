from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import StochasticDepth


class PreNormBlock(nn.Module):
    """Residual layer of a token mixer and a channel mixer, each behind its norm, with drop path.

    x = x + drop_path(mixer(norm(x), hw)), then x = x + drop_path(channel_mixer(norm(x))).

    Args:
        drop_path: Probability that a sample skips a branch during training.
        **parts: The norm and the token mixer, called with (tokens, hw), the norm and the channel
            mixer, called with tokens; in this order, each under its name in state dicts.
    """

    def __init__(self, drop_path: float, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.part_names = tuple(parts)
        self.drop_path = StochasticDepth(drop_path, 'row')

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Apply the layer.

        Args:
            x: Tokens, shape (B, T, C).
            hw: Token grid (rows, columns), T = rows * columns.

        Returns:
            Shape (B, T, C).
        """
        token_norm, token_mixer, channel_norm, channel_mixer = (
            self.get_submodule(name) for name in self.part_names
        )
        x = x + self.drop_path(token_mixer(token_norm(x), hw))
        return x + self.drop_path(channel_mixer(channel_norm(x)))
