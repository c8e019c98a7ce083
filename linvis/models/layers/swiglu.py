from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_STD = 0.02


class SwiGLU(nn.Module):
    """Channel mixer of ViG: W_2 (silu(a) * b) with (a, b) the halves of W_1 x.

    Args:
        embed_dims: Channels C.
        multiple: The hidden channels are 8 / 3 of C, rounded up to a multiple of this.
        names: Names of W_1 and W_2 in state dicts.

    Source:
        GLU Variants Improve Transformer, arXiv:2002.05202.
    """

    def __init__(self, embed_dims: int, multiple: int, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        hidden = -(-(8 * embed_dims // 3) // multiple) * multiple
        into = nn.Linear(embed_dims, 2 * hidden, bias=False)
        out_of = nn.Linear(hidden, embed_dims, bias=False)
        for name, linear in zip(names, (into, out_of), strict=True):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of tokens (B, T, C)."""
        into, out_of = (getattr(self, name) for name in self.names)
        gate, value = into(x).chunk(2, dim=-1)
        return out_of(F.silu(gate) * value)
