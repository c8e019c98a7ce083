"""Backends of bidirectional gated linear attention, the preferred one first."""

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops._triton import dtype_unavailable, triton_unavailable
from linvis_ops.bi_gla.reference import bi_gla_backward, bi_gla_chunked

# Widest head whose states fit the registers of a program.
WIDEST = 128


def _triton_unavailable(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.shape[-1] > WIDEST:
            return f'its kernels take heads of at most {WIDEST} channels, not {tensor.shape[-1]}'
    return triton_unavailable(*tensors) or dtype_unavailable(*tensors)


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float | None
) -> Tensor:
    from linvis_ops.bi_gla import kernels_triton  # needs triton, which may be absent

    return kernels_triton.bi_gla_forward(q, k, v, g_fwd, g_bwd, scale)


def _triton_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from linvis_ops.bi_gla import kernels_triton_backward

    return kernels_triton_backward.bi_gla_backward(go, q, k, v, g_fwd, g_bwd, scale)


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend('triton', _triton_unavailable, _triton_forward, _triton_backward),
    Backend('torch', _always, bi_gla_chunked, bi_gla_backward),
)
