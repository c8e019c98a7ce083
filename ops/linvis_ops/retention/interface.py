"""The public functions of retention."""

import torch
from torch import Tensor

from linvis_ops import _checks, _dispatch
from linvis_ops._dtypes import accumulation_dtype
from linvis_ops._library import without_autocast
from linvis_ops.retention import op
from linvis_ops.retention.reference import retention_chunked_with_state, retention_parallel
from linvis_ops.retention.state import add_state

NAME = 'retention'
WITH_STATE = 'retention_with_state'
DIRECTIONS = ('causal', 'bidirectional')


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    hw: tuple[int, int] | None = None,
    direction: str = 'causal',
    scale: float | None = None,
    *,
    backend: str = 'auto',
) -> Tensor:
    """Retention: attention without softmax, whose weights decay with distance.

    o[t] = scale * sum_s D[t, s] (q[t] . k[s]) v[s]. In a sequence D[t, s] is gamma^(t - s) for
    s <= t and 0 for later tokens. On a grid it is gamma^(columns + rows) for a token that lies so
    many columns to the left and rows above, both at least 0, and 0 for all others. In the
    bidirectional form every token is seen, at the absolute distance.

    Args:
        q: Queries, shape (B, T, H, K), float32, float16, bfloat16 or float64.
        k: Keys, same shape and dtype as q.
        v: Values, shape (B, T, H, V), same dtype as q.
        log_gamma: Logarithm of the decay of each head for one step, natural, at most 0 (which is
            not checked), shape (H,), float32 (float64 beside float64 tokens). A constant: only
            backend='reference' has a gradient by it.
        hw: (rows, columns) of a token grid in raster order, T = rows * columns, or one more with a
            class token, which comes last and stands below the last row in the last column. None: a
            plain sequence.
        direction: 'causal' or 'bidirectional'.
        scale: Factor of the output; None: K**-0.5.
        backend: 'auto', or one of `available_backends('retention')`. 'reference' is the definition
            in differentiable PyTorch: O(T^2) memory, any order of derivatives.

    Returns:
        Tensor of shape (B, T, H, V), contiguous, in the dtype of v. Sums are accumulated in float32
        (float64 for float64).

    Raises:
        ValueError: If shapes or devices disagree, hw does not match T, there is no such direction,
            or log_gamma requires a gradient and the backend is not 'reference'.
        TypeError: If dtypes disagree, hw is not made of ints, or scale is no number.
        BackendUnavailableError: If the named backend cannot run these inputs; the message says why.

    Source:
        RetNet (Sun et al., 2023); its decay on a grid: ViR (Hatamizadeh et al., 2023). README.md
        of this folder has the derivation.
    """
    _check_inputs(NAME, q, k, v, log_gamma, scale)
    columns = _columns_of(NAME, q, hw)
    if direction not in DIRECTIONS:
        raise ValueError(
            f'{NAME}: direction must be one of {", ".join(DIRECTIONS)}, got {direction!r}.'
        )
    bidirectional = direction == 'bidirectional'
    backend = _dispatch.requested_backend(NAME, backend)
    if backend == _dispatch.REFERENCE:
        with without_autocast(q):
            o = retention_parallel(q, k, v, log_gamma, columns, bidirectional, scale)
            return o.contiguous()
    _check_constant(NAME, log_gamma)
    return op.retention_fwd(q, k, v, log_gamma, columns, bidirectional, scale, backend)


def retention_with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    hw: tuple[int, int] | None = None,
    state: Tensor | None = None,
    direction: str = 'causal',
    scale: float | None = None,
    *,
    backend: str = 'auto',
) -> tuple[Tensor, Tensor]:
    """Causal retention of a sequence in pieces, each of which takes the state of those before it.

    The outputs of the pieces, one after the other, are that of `retention` for the whole. A grid
    comes in bands of whole rows; a class token comes with the last one, or after it, by itself,
    with hw = (0, columns). A piece may be empty (T = 0): so is its output then, and the state stays
    as it was, zeros for the first piece; no backend has to run for it.

    Args:
        q: Queries of this piece, shape (B, T, H, K), float32, float16, bfloat16 or float64.
        k: Keys, same shape and dtype as q.
        v: Values, shape (B, T, H, V), same dtype as q.
        log_gamma: Logarithm of the decay of each head for one step, natural, at most 0 (which is
            not checked), shape (H,), float32 (float64 beside float64 tokens).
        hw: (rows, columns) of this band of the token grid. None: a piece of a plain sequence.
        state: What the call for the piece before returned. None: this is the first piece.
        direction: 'causal': a state knows nothing of tokens that follow.
        scale: Factor of the output; None: K**-0.5.
        backend: 'auto', or one of `available_backends('retention')`: what runs the piece itself,
            as in `retention`; the state's share is made of matrix products of PyTorch. 'reference'
            is the chunkwise form in differentiable PyTorch, any order of derivatives; 'auto' takes
            it where log_gamma requires a gradient.

    Returns:
        Output of this piece, shape (B, T, H, V), contiguous, in the dtype of v; and the state
        behind it, shape (B, H, K, V) for a plain sequence, else (B, H, columns, K, V), float32
        (float64 for float64), in any order in memory. Both are differentiable, by the state too.

    Raises:
        ValueError: If shapes or devices disagree, hw does not match T, direction is not 'causal',
            or log_gamma requires a gradient and the backend is neither 'auto' nor 'reference'.
        TypeError: If dtypes disagree, hw is not made of ints, state is no tensor, or scale is no
            number.
        BackendUnavailableError: If the named backend cannot run these inputs; the message says why.
    """
    _check_inputs(WITH_STATE, q, k, v, log_gamma, scale, least_tokens=0)
    columns = _columns_of(WITH_STATE, q, hw, least_rows=0)
    if direction != 'causal':
        raise ValueError(
            f"{WITH_STATE}: direction must be 'causal', got {direction!r}; a state knows nothing "
            f'of tokens that follow.'
        )
    plain = hw is None  # its state is that of a grid of one column, without that dimension
    if state is not None:
        _check_state(q, v, columns, plain, state)
        state = state[:, :, None] if plain else state
    backend = _dispatch.requested_backend(NAME, backend)
    if backend == 'auto' and _needs_gradient(log_gamma):
        backend = _dispatch.REFERENCE
    if backend != _dispatch.REFERENCE:
        _check_constant(WITH_STATE, log_gamma)
    with without_autocast(q):
        if q.shape[1] == 0:
            o = (q * k).sum(-1, keepdim=True) * v  # of no elements, and differentiable
            o, state = add_state(o, q, k, v, log_gamma, columns, scale, state)
        elif backend == _dispatch.REFERENCE:
            o, state = retention_chunked_with_state(q, k, v, log_gamma, columns, scale, state)
        else:
            o = op.retention_fwd(q, k, v, log_gamma, columns, False, scale, backend)
            o, state = add_state(o, q, k, v, log_gamma, columns, scale, state)
    return o, state[:, :, 0] if plain else state


def _check_inputs(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    scale: float | None,
    least_tokens: int = 1,
) -> None:
    """Raise unless the tensors fit each other and scale is a number or None."""
    _checks.check_tensors(name, q=q, k=k, v=v, log_gamma=log_gamma)
    _checks.check_heads(name, q, k, v, least_tokens)
    _checks.check_channels(name, q.shape[2], q.dtype, log_gamma=log_gamma)
    _checks.check_device(name, [('q', q), ('k', k), ('v', v), ('log_gamma', log_gamma)])
    _checks.check_scale(name, scale)


def _needs_gradient(log_gamma: Tensor) -> bool:
    return log_gamma.requires_grad and torch.is_grad_enabled()


def _check_constant(name: str, log_gamma: Tensor) -> None:
    """Raise ValueError if a gradient by log_gamma is wanted."""
    if _needs_gradient(log_gamma):
        raise ValueError(
            f"{name}: log_gamma requires a gradient, which only backend='reference' computes; "
            f'detach it.'
        )


def _columns_of(name: str, q: Tensor, hw: tuple[int, int] | None, least_rows: int = 1) -> int:
    """Columns of the grid, 1 for a plain sequence; raises unless the tokens fill the grid."""
    if hw is None:
        return 1
    _checks.check_grid(name, q.shape[1], hw, least_rows)
    return hw[1]


def _check_state(q: Tensor, v: Tensor, columns: int, plain: bool, state: Tensor) -> None:
    """Raise unless the state has the shape, dtype and device that such inputs leave."""
    _checks.check_tensors(WITH_STATE, state=state)
    batch, _, heads, width = q.shape
    shape = (batch, heads, *(() if plain else (columns,)), width, v.shape[-1])
    if state.shape != shape:
        raise ValueError(f'{WITH_STATE}: state must be {shape}, got {_checks.shape_text(state)}.')
    dtype = accumulation_dtype(v.dtype)
    if state.dtype != dtype:
        raise TypeError(f'{WITH_STATE}: state must be {dtype}, got {state.dtype}; cast it first.')
    _checks.check_device(WITH_STATE, [('q', q), ('state', state)])
