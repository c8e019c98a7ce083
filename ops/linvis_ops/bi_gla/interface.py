"""The public function of bidirectional gated linear attention."""

from torch import Tensor

from linvis_ops import _dispatch
from linvis_ops._library import without_autocast
from linvis_ops.bi_gla.reference import bi_gla_quadratic, bi_gla_recurrent

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
    """Bidirectional gated linear attention: two decaying states, read by one query.

    o[t] = scale * q[t] (Sf[t] + Sb[t]) / 2, with the (K, V) states
    Sf[t] = diag(exp g_fwd[t]) Sf[t-1] + k[t] v[t]^T and
    Sb[t] = diag(exp g_bwd[t]) Sb[t+1] + k[t] v[t]^T, zero beyond the ends.
    The token itself counts in both.

    Args:
        q: Queries, shape (B, T, H, K), float32, float16, bfloat16 or float64.
        k: Keys, same shape and dtype as q.
        v: Values, shape (B, T, H, V), same dtype as q.
        g_fwd: Log gates of the forward direction, same shape as q, natural log, at most 0.
            In the dtype of q, or float32 beside float16 and bfloat16.
        g_bwd: Log gates of the backward direction, same shape and dtype as g_fwd.
        scale: Factor of the output; None: K**-0.5.
        backend: 'auto', or one of `available_backends('bi_gla')`. 'reference' is the definition in
            differentiable PyTorch: O(T^2) memory, any order of derivatives.

    Returns:
        Tensor of shape (B, T, H, V), contiguous, in the dtype of v. Sums are accumulated in float32
        (float64 for float64).

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes disagree.
        BackendUnavailableError: If the named backend cannot run these inputs; the message says why.
    """
    if scale is None:
        scale = float(q.shape[-1] ** -0.5)
    with without_autocast(q):
        if backend == _dispatch.REFERENCE:
            return bi_gla_quadratic(q, k, v, g_fwd, g_bwd, scale)
        return bi_gla_recurrent(q, k, v, g_fwd, g_bwd, scale).contiguous()
