"""Backends of Q-Shift, the preferred one first."""

from functools import partial

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops._triton import dtype_unavailable, triton_unavailable
from linvis_ops.q_shift.reference import q_shift_sliced

# the kernels count tokens, and steps of a whole row beyond them, in 32 bits
MAX_TOKENS = 2**30


def kernels_unavailable(*tensors: Tensor) -> str | None:
    """Reason why the Triton kernels cannot take these tensors, x (B, T, C) first, or None."""
    reason = triton_unavailable(*tensors) or dtype_unavailable(*tensors)
    if reason is None and tensors and tensors[0].shape[0] * tensors[0].shape[1] > MAX_TOKENS:
        return 'its kernels take up to 2**30 tokens in all'
    return reason


def _triton(x: Tensor, rows: int, columns: int, heads: int, adjoint: bool) -> Tensor:
    from linvis_ops.q_shift import kernels_triton  # needs triton, which may be absent

    return kernels_triton.q_shift(x, rows, columns, heads, adjoint)


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend(
        'triton',
        kernels_unavailable,
        partial(_triton, adjoint=False),
        partial(_triton, adjoint=True),
    ),
    Backend(
        'torch',
        _always,
        partial(q_shift_sliced, adjoint=False),
        partial(q_shift_sliced, adjoint=True),
    ),
)
