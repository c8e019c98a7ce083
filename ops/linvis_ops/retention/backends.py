"""Backends of retention, the preferred one first."""

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops._triton import dtype_unavailable, triton_unavailable
from linvis_ops.retention.reference import retention_backward, retention_chunked

# Widest head whose states fit the registers of a program.
WIDEST = 128


def _triton_unavailable(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.dim() > 1 and tensor.shape[-1] > WIDEST:  # not log_gamma
            return f'its kernels take heads of at most {WIDEST} channels, not {tensor.shape[-1]}'
    return triton_unavailable(*tensors) or dtype_unavailable(*tensors)


def _is_grid(q: Tensor, columns: int) -> bool:
    """Whether there are two rows or more, and columns; a class token is no row of tokens."""
    return 1 < columns <= q.shape[1] // 2


def _triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int,
    bidirectional: bool,
    scale: float | None,
) -> Tensor:
    from linvis_ops.retention import kernels_triton, kernels_triton_grid  # triton may be absent

    if _is_grid(q, columns):
        return kernels_triton_grid.retention_forward(
            q, k, v, log_gamma, columns, bidirectional, scale
        )
    return kernels_triton.retention_forward(q, k, v, log_gamma, bidirectional, scale)


def _triton_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int,
    bidirectional: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from linvis_ops.retention import kernels_triton_backward, kernels_triton_grid

    if _is_grid(q, columns):
        return kernels_triton_grid.retention_backward(
            go, q, k, v, log_gamma, columns, bidirectional, scale
        )
    return kernels_triton_backward.retention_backward(go, q, k, v, log_gamma, bidirectional, scale)


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend('triton', _triton_unavailable, _triton_forward, _triton_backward),
    Backend('torch', _always, retention_chunked, retention_backward),
)
