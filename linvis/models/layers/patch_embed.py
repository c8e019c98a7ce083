from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true


class PatchEmbed(nn.Module):
    """Non-overlapping patches of a picture, each projected to one token.

    Height and width that are not multiples of the patch size are padded with zeros at the bottom
    and at the right.

    Args:
        in_channels: Channels of the picture.
        embed_dims: Channels of a token.
        patch_size: Side of a patch in pixels.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, stride=patch_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for a picture of height x width pixels."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn pictures into tokens in raster order.

        Args:
            images: Shape (B, in_channels, H, W), any H, W >= 1.

        Returns:
            Tokens (B, Hp * Wp, embed_dims) and the grid (Hp, Wp).
        """
        height, width = images.shape[-2:]
        rows, cols = self.grid_of(height, width)
        bottom, right = rows * self.patch_size - height, cols * self.patch_size - width
        # a symbolic size is always padded, by a number that may turn out to be zero
        if not statically_known_true(bottom == 0) or not statically_known_true(right == 0):
            images = F.pad(images, (0, right, 0, bottom))
        return self.projection(images).flatten(2).transpose(1, 2), (rows, cols)
