"""The public function of Bi-WKV."""

from torch import Tensor

from linvis_ops import _checks, _dispatch
from linvis_ops._library import without_autocast
from linvis_ops.bi_wkv import op
from linvis_ops.bi_wkv.reference import bi_wkv_quadratic

NAME = 'bi_wkv'


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, backend: str = 'auto') -> Tensor:
    """Bidirectional WKV: per channel, a normalised, distance-decayed average of values.

    y[t] = sum_s exp(b[t, s] + k[s]) v[s] / sum_s exp(b[t, s] + k[s]),
    with b[t, t] = u and b[t, s] = -w (|t - s| - 1).

    Args:
        w: Decay per token step, shape (C,), float32, natural-log units; any sign.
            Divide by T beforehand for the paper's form.
        u: Bonus of the token itself, shape (C,), float32.
        k: Keys (log weights), shape (B, T, C), float32, float16, bfloat16 or float64. One of -inf
            takes its token out; a channel of a sequence without any other gives NaN.
        v: Values, same shape and dtype as k.
        backend: 'auto', or one of `available_backends('bi_wkv')`. 'reference' is the definition in
            differentiable PyTorch: O(T^2) memory, any order of derivatives. 'auto' may take the
            CUDA streaming kernels, which are 9 (T = 196) to 78 times (T = 16,384) slower where keys
            of a sequence lie so far apart (66 above its middle token, or 16 neighbours 40 below it
            or -inf) that they compute everything in a second way: name 'triton' for such keys.

    Returns:
        Tensor of shape (B, T, C), contiguous, in the dtype of v. Sums are accumulated in float32
        (float64 for float64).

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes disagree; beside float64 tokens w and u are float64, else float32.
        BackendUnavailableError: If the named backend cannot run these inputs; the message says why.

    Source:
        Vision-RWKV (Duan et al., 2024), equation 5; README.md of this folder has the derivation and
        where the authors' kernel differs.
    """
    _checks.check_tensors(NAME, w=w, u=u, k=k, v=v)
    _checks.check_tokens(NAME, k=k, v=v)
    _checks.check_channels(NAME, k.shape[2], k.dtype, w=w, u=u)
    _checks.check_device(NAME, [('k', k), ('w', w), ('u', u)])
    backend = _dispatch.requested_backend(NAME, backend)
    if backend == _dispatch.REFERENCE:
        with without_autocast(k):
            return bi_wkv_quadratic(w, u, k, v)
    return op.bi_wkv_fwd(w, u, k, v, backend)
