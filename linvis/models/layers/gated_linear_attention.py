from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linvis.models.layers.featmap import to_featmap, to_tokens
from linvis.models.layers.norm import RMSNorm
from linvis_ops import bi_gla

GATE_RANK = 16
GATE_DIVISOR = 16
INITIAL_GAIN = 2**-2.5


class GatedLinearAttention(nn.Module):
    """Token mixer of ViG: bidirectional gated linear attention, gated against a local branch.

    With l = act(depthwise convolution 3 x 3 of x on its grid), for each head:

        q, k, v = W_q l, W_k l, W_v l
        log gate of each direction = log sigmoid(W_2 W_1 l + b) / 16
        s = sigmoid(W_g l + b_g)
        out = W_o act(s * norm(bi_gla(q, k, v, gates)) + (1 - s) * norm(l))

    W_1 has rank 16 and serves both directions; q and k have half the channels of v. The norms are
    RMSNorms over the channels of a head, of which all heads share the weight. Each act is SiLU or
    nothing.

    Args:
        embed_dims: Channels C.
        num_heads: Heads H; V = C / H channels of values each and K = V / 2 of keys.
        conv_act: Apply SiLU to the local branch.
        out_act: Apply SiLU before the last projection.
        backend: Backend of the operator.

    Raises:
        ValueError: If the channels cannot be divided among the heads.

    Source:
        ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention,
        arXiv:2405.18425.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, *, conv_act: bool, out_act: bool, backend: str
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dims % (2 * num_heads):
            raise ValueError(
                f'embed_dims must be a multiple of twice the heads, got {embed_dims} channels and '
                f'{num_heads} heads.'
            )
        self.backend = backend
        self.num_heads = num_heads
        self.key_dims = embed_dims // 2
        head_dims = embed_dims // num_heads

        self.in_proj = nn.Sequential(
            nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims, bias=False),
            nn.SiLU() if conv_act else nn.Identity(),
        )
        self.qkv_proj = nn.Linear(embed_dims, 2 * self.key_dims + embed_dims, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(embed_dims, GATE_RANK, bias=False),
            nn.Linear(GATE_RANK, 2 * self.key_dims),
        )
        self.g_proj = nn.Linear(embed_dims, embed_dims)
        self.g_norm = RMSNorm(head_dims, cast_output=True)
        self.l_norm = RMSNorm(head_dims, cast_output=True)
        self.out_act = nn.SiLU() if out_act else nn.Identity()
        self.o_proj = nn.Linear(embed_dims, embed_dims, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, gain=INITIAL_GAIN)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix tokens.

        Args:
            x: Tokens, shape (B, T, C).
            hw: Token grid (rows, columns), T = rows * columns.

        Returns:
            Shape (B, T, C).
        """
        local = to_tokens(self.in_proj(to_featmap(x, hw)))
        q, k, v = self.qkv_proj(local).split((self.key_dims, self.key_dims, x.shape[-1]), dim=-1)
        # in the dtype of q; the operator sums them up in float32
        gates = F.logsigmoid(self.gk_proj(local)) / GATE_DIVISOR
        g_fwd, g_bwd = (self._heads(gate) for gate in gates.chunk(2, dim=-1))
        q, k, v = (self._heads(each) for each in (q, k, v))
        attended = bi_gla(q, k, v, g_fwd, g_bwd, backend=self.backend)  # (B, T, H, V)
        share = torch.sigmoid(self.g_proj(local))
        mixed = torch.lerp(
            self.l_norm(self._heads(local)), self.g_norm(attended), self._heads(share)
        )
        return self.o_proj(self.out_act(mixed.flatten(2)))
