from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from linvis.models.layers.norm import RMSNorm
from linvis_ops import retention, retention_with_state

DECAYS = ('1d', '2d')
DIRECTIONS = ('causal', 'bidirectional')
# 1 - gamma of the first and of the last head
FASTEST, SLOWEST = 1 / 32, 1 / 512


def log_decays(num_heads: int) -> Tensor:
    """Natural logarithms of the decays of the heads, float32: 1 - gamma from 1/32 to 1/512.

    In float64 up to the last step: the decays are that near to 1.
    """
    lost = torch.linspace(math.log(FASTEST), math.log(SLOWEST), num_heads, dtype=torch.float64)
    return torch.log1p(-lost.exp()).float()


class StreamState:
    """What the tokens so far leave to those that follow, in one token mixer.

    Attributes:
        value: State of the operator; None before the first tokens.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._fixed = False

    @property
    def value(self) -> Tensor | None:
        """State of the operator."""
        return self._value

    @value.setter
    def value(self, new: Tensor) -> None:
        if self._fixed and self._value is not None:
            self._value.copy_(new)
        else:
            self._value = new

    def fix(self) -> None:
        """Keep all values from now on in one place in memory, as a CUDA graph needs it."""
        assert self._value is not None
        with torch.inference_mode(False):  # what can be written in every mode
            self._value = self._value.clone()
        self._fixed = True


class Retention(nn.Module):
    """Token mixer of ViR: retention of every head with a fixed decay of its own.

        q, k, v = W_q x, W_k x, W_v x (with biases)
        out = W_o norm(retention(q, k, v, log_gamma))

    There is no softmax and no gate. The norm is nothing, as in ViR, or that of RetNet: an RMSNorm
    over the channels of a head, of which all heads share the weight.

    Args:
        embed_dims: Channels C.
        num_heads: Heads H of C / H channels.
        decay: '1d' along the sequence, or '2d' over rows and columns.
        direction: 'causal' or 'bidirectional'.
        head_norm: Normalise each head behind the operator.
        backend: Backend of the operator.

    Raises:
        ValueError: If the channels cannot be divided among the heads, or there is no such decay or
            direction.

    Source:
        ViR: Towards Efficient Vision Retention Backbones, arXiv:2310.19731. The norm: Retentive
        Network: A Successor to Transformer for Large Language Models, arXiv:2307.08621.
    """

    log_gamma: Tensor

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        *,
        decay: str,
        direction: str,
        head_norm: bool,
        backend: str,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dims % num_heads:
            raise ValueError(
                f'embed_dims must be a multiple of the heads, got {embed_dims} channels and '
                f'{num_heads} heads.'
            )
        for name, value, known in (
            ('retention', decay, DECAYS),
            ('direction', direction, DIRECTIONS),
        ):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}.')
        self.num_heads = num_heads
        self.decay = decay
        self.direction = direction
        self.backend = backend
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.head_norm = (
            RMSNorm(embed_dims // num_heads, cast_output=True) if head_norm else nn.Identity()
        )
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        self.register_buffer('log_gamma', log_decays(num_heads), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Retention:
        super()._apply(fn, recurse)
        # decays stay float32 where the module is cast, and are there where memory was made anew
        self.log_gamma = log_decays(self.num_heads).to(self.log_gamma.device)
        return self

    def forward(self, x: Tensor, hw: tuple[int, int], state: StreamState | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: Tokens, shape (B, T, C).
            hw: Token grid (rows, columns), T = rows * columns, or one more with a class token,
                which comes last.
            state: What the tokens before these left; takes what these leave. None: these are all.

        Returns:
            Shape (B, T, C).

        Raises:
            ValueError: If there is a state and the direction is not 'causal'.
        """
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in self.qkv(x).chunk(3, dim=-1))
        grid = hw if self.decay == '2d' else None
        log_gamma = self.log_gamma.to(torch.promote_types(torch.float32, q.dtype))
        if state is None:
            o = retention(q, k, v, log_gamma, grid, self.direction, backend=self.backend)
        else:
            o, state.value = retention_with_state(
                q, k, v, log_gamma, grid, state.value, self.direction, backend=self.backend
            )
        return self.out_proj(self.head_norm(o).flatten(2))
