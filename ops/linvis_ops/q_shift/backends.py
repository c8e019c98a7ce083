"""Backends of Q-Shift, the preferred one first."""

from functools import partial

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops._triton import dtype_unavailable, triton_unavailable
from linvis_ops.q_shift.reference import q_shift_sliced


def _triton_unavailable(*tensors: Tensor) -> str | None:
    return triton_unavailable(*tensors) or dtype_unavailable(*tensors)


def _triton(x: Tensor, rows: int, columns: int, adjoint: bool) -> Tensor:
    from linvis_ops.q_shift import kernels_triton  # needs triton, which may be absent

    return kernels_triton.q_shift(x, rows, columns, adjoint)


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend(
        'triton',
        _triton_unavailable,
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
