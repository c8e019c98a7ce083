from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from linvis.models.layers.featmap import to_tokens
from linvis.models.layers.norm import LayerNorm2d


class PatchEmbed(nn.Module):
    """Non-overlapping patches of a picture, each projected to one token.

    Height and width that are not multiples of the patch size are padded with zeros at the bottom
    and at the right.

    Args:
        in_channels: Channels of the picture.
        embed_dims: Channels of a token.
        patch_size: Side of a patch in pixels.
        name: Name of the projection in state dicts.

    Raises:
        ValueError: If patch_size is less than 1.
    """

    def __init__(
        self, in_channels: int, embed_dims: int, patch_size: int, name: str = 'projection'
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f'patch_size must be at least 1, got {patch_size}.')
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.name = name
        self.add_module(name, nn.Conv2d(in_channels, embed_dims, patch_size, stride=patch_size))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for a picture of height x width pixels."""
        return grid_of(height, width, self.patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn pictures into tokens in raster order.

        Args:
            images: Shape (B, in_channels, H, W), any H, W >= 1.

        Returns:
            Tokens (B, Hp * Wp, embed_dims) and the grid (Hp, Wp).
        """
        hw = self.grid_of(*images.shape[-2:])
        padded = pad_to_patches(images, self.patch_size)
        return self.get_submodule(self.name)(padded).flatten(2).transpose(1, 2), hw


class ConvPatchEmbed(nn.Module):
    """Overlapping patches: two convolutions with norms, of stride patch_size / 2 and 2.

    Height and width that are not multiples of the patch size are padded with zeros at the bottom
    and at the right.

    Args:
        in_channels: Channels of the picture.
        embed_dims: Channels of a token, an even number.
        patch_size: Stride of a patch in pixels, an even number from 4 on.

    Raises:
        ValueError: If patch_size is not such a number.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.proj = nn.Sequential(*conv_stem(in_channels, embed_dims, patch_size, nn.SiLU()))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for a picture of height x width pixels."""
        return grid_of(height, width, self.patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn pictures into tokens in raster order.

        Args:
            images: Shape (B, in_channels, H, W), any H, W >= 1.

        Returns:
            Tokens (B, Hp * Wp, embed_dims) and the grid (Hp, Wp).
        """
        hw = self.grid_of(*images.shape[-2:])
        return to_tokens(self.proj(pad_to_patches(images, self.patch_size))), hw


def conv_stem(
    in_channels: int, embed_dims: int, patch_size: int, activation: nn.Module
) -> tuple[nn.Module, ...]:
    """Steps of a stem: convolution of stride patch_size / 2, norm, activation, one of 2, norm.

    A picture whose sides are multiples of patch_size gives one position for each patch. With a
    patch size of 4, any other gives one position for each begun patch.

    Args:
        in_channels: Channels of the picture.
        embed_dims: Channels of the result, half as many between the convolutions.
        patch_size: Stride of the stem, an even number from 4 on.
        activation: Module between the two.

    Raises:
        ValueError: If patch_size is not such a number.
    """
    if patch_size < 4 or patch_size % 2:
        raise ValueError(f'patch_size must be an even number from 4 on, got {patch_size}.')
    hidden, stride = embed_dims // 2, patch_size // 2
    return (
        nn.Conv2d(in_channels, hidden, stride + 1, stride=stride, padding=1),
        LayerNorm2d(hidden, cast_output=True),
        activation,
        nn.Conv2d(hidden, embed_dims, 3, stride=2, padding=1),
        LayerNorm2d(embed_dims),
    )


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches that cover height x width pixels."""
    return -(-height // patch_size), -(-width // patch_size)


def pad_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Pad pictures with zeros at the bottom and at the right to whole patches."""
    height, width = images.shape[-2:]
    rows, cols = grid_of(height, width, patch_size)
    bottom, right = rows * patch_size - height, cols * patch_size - width
    # a symbolic size is always padded, by a number that may turn out to be zero
    if not statically_known_true(bottom == 0) or not statically_known_true(right == 0):
        images = F.pad(images, (0, right, 0, bottom))
    return images
