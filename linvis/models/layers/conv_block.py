from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from linvis.models.layers.featmap import to_featmap, to_tokens
from linvis.models.layers.norm import LayerNorm


class ConvBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions behind a norm, with drop path.

    x = x + drop_path(conv2(gelu(conv1(norm(x))))), the convolutions on the grid of the tokens.

    Args:
        embed_dims: Channels C.
        drop_path: Probability that a sample skips the branch during training.
    """

    def __init__(self, embed_dims: int, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm(embed_dims, cast_output=True)
        self.conv1 = nn.Conv2d(embed_dims, embed_dims, 3, padding=1)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(embed_dims, embed_dims, 3, padding=1)
        self.drop_path = StochasticDepth(drop_path, 'row')

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Apply the block.

        Args:
            x: Tokens, shape (B, T, C).
            hw: Token grid (rows, columns), T = rows * columns.

        Returns:
            Shape (B, T, C).
        """
        branch = self.conv2(self.act(self.conv1(to_featmap(self.norm(x), hw))))
        return x + self.drop_path(to_tokens(branch))
