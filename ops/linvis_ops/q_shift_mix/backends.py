"""Backends of Q-Shift with mixes, the preferred one first."""

from typing import Any

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops.q_shift.backends import kernels_unavailable
from linvis_ops.q_shift_mix.reference import q_shift_mix_backward, q_shift_mix_forward


def _triton_forward(*args: Any) -> list[Tensor]:
    from linvis_ops.q_shift_mix import kernels_triton  # needs triton, which may be absent

    return kernels_triton.q_shift_mix_forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from linvis_ops.q_shift_mix import kernels_triton_backward

    return kernels_triton_backward.q_shift_mix_backward(*args)


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend('triton', kernels_unavailable, _triton_forward, _triton_backward),
    Backend('torch', _always, q_shift_mix_forward, q_shift_mix_backward),
)
