"""The public function of bidirectional gated linear attention."""

import torch
from torch import Tensor

from linvis_ops import _checks, _dispatch
from linvis_ops._library import without_autocast
from linvis_ops.bi_gla import op
from linvis_ops.bi_gla.reference import bi_gla_quadratic

NAME = 'bi_gla'


def bi_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None = None,
    *,
    backend: str = 'auto',
) -> Tensor:
    """Bidirectional gated linear attention: one query reads two decaying states.

    o[t] = scale * q[t] (Sf[t] + Sb[t]) / 2, with K x V states
    Sf[t] = diag(exp g_fwd[t]) Sf[t - 1] + k[t] v[t]^T and
    Sb[t] = diag(exp g_bwd[t]) Sb[t + 1] + k[t] v[t]^T, which are zero beyond the ends.
    The token itself counts in both.

    Args:
        q: Queries, shape (B, T, H, K), float32, float16, bfloat16 or float64.
        k: Keys, same shape and dtype as q.
        v: Values, shape (B, T, H, V), same dtype as q.
        g_fwd: Logarithms of the forward gates, natural, at most 0 (which is not checked), same
            shape as q; in the dtype of q, or in float32 beside float16 and bfloat16.
        g_bwd: Logarithms of the backward gates; shape and dtype of g_fwd.
        scale: Factor of the output; None: K**-0.5.
        backend: 'auto', or one of `available_backends('bi_gla')`. 'reference' is the definition in
            differentiable PyTorch: O(T^2) memory, any order of derivatives.

    Returns:
        Tensor of shape (B, T, H, V), contiguous, in the dtype of v. Sums are accumulated in float32
        (float64 for float64).

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes disagree, or scale is no number.
        BackendUnavailableError: If the named backend cannot run these inputs; the message says why.

    Source:
        Gated linear attention (Yang et al., 2024), in two directions with their own gates as in
        ViG (Liao et al., 2024); README.md of this folder has the derivation.
    """
    _checks.check_tensors(NAME, q=q, k=k, v=v, g_fwd=g_fwd, g_bwd=g_bwd)
    _checks.check_heads(NAME, q, k, v)
    _check_gates(q, g_fwd, g_bwd)
    _checks.check_device(NAME, [('q', q), ('k', k), ('v', v), ('g_fwd', g_fwd), ('g_bwd', g_bwd)])
    _checks.check_scale(NAME, scale)
    backend = _dispatch.requested_backend(NAME, backend)
    if backend == _dispatch.REFERENCE:
        with without_autocast(q):
            return bi_gla_quadratic(q, k, v, g_fwd, g_bwd, scale).contiguous()
    return op.bi_gla_fwd(q, k, v, g_fwd, g_bwd, scale, backend)


def _check_gates(q: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> None:
    """Raise unless the gates have the shape of q, and its dtype or float32 beside a short one."""
    allowed = {q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32}
    for name, gate in (('g_fwd', g_fwd), ('g_bwd', g_bwd)):
        if gate.shape != q.shape:
            raise ValueError(
                f'{NAME}: q and {name} must have one shape, '
                f'got q {_checks.shape_text(q)}, {name} {_checks.shape_text(gate)}.'
            )
        if gate.dtype not in allowed:
            names = ' or '.join(sorted(map(str, allowed)))
            raise TypeError(
                f'{NAME}: {name} must be {names} beside {q.dtype} q, got {gate.dtype}; '
                f'cast it first.'
            )
    if g_fwd.dtype != g_bwd.dtype:
        raise TypeError(
            f'{NAME}: g_fwd and g_bwd must have one dtype, got {g_fwd.dtype} and {g_bwd.dtype}.'
        )
