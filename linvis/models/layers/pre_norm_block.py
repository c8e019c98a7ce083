from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import StochasticDepth


class PreNormBlock(nn.Module):
    """Residual layer of a token mixer and a channel mixer, each behind its norm, with drop path.

    x = x + drop_path(mixer(norm(x), hw)), then x = x + drop_path(channel_mixer(norm(x))); with
    layer scale, drop_path(scale(...)).

    Args:
        drop_path: Probability that a sample skips a branch during training.
        **parts: The norm and the token mixer, called with (tokens, hw), the norm and the channel
            mixer, called with tokens; in this order, each under its name in state dicts. With layer
            scale each mixer is followed by its scale.

    Raises:
        ValueError: If these are not four or six parts.
    """

    def __init__(self, drop_path: float, **parts: nn.Module) -> None:
        super().__init__()
        if len(parts) not in (4, 6):
            raise ValueError(f'A layer has 4 parts, or 6 with layer scale, got {len(parts)}.')
        for name, part in parts.items():
            self.add_module(name, part)
        self.part_names = tuple(parts)
        self.drop_path = StochasticDepth(drop_path, 'row')

    def forward(self, x: Tensor, hw: tuple[int, int], *mixer_arguments: Any) -> Tensor:
        """Apply the layer.

        Args:
            x: Tokens, shape (B, T, C).
            hw: Token grid (rows, columns), T = rows * columns, or more as the token mixer allows.
            *mixer_arguments: Further arguments of the token mixer.

        Returns:
            Shape (B, T, C).
        """
        parts = [getattr(self, name) for name in self.part_names]
        token_norm, token_mixer, *token_scale = parts[: len(parts) // 2]
        channel_norm, channel_mixer, *channel_scale = parts[len(parts) // 2 :]
        x = self._add(x, token_mixer(token_norm(x), hw, *mixer_arguments), token_scale)
        return self._add(x, channel_mixer(channel_norm(x)), channel_scale)

    def _add(self, x: Tensor, branch: Tensor, scales: Sequence[nn.Module]) -> Tensor:
        """The residual stream behind a branch, which nothing keeps after it."""
        for scale in scales:
            branch = scale(branch)
        return x + self.drop_path(branch)
