"""Backends of the norm over channels, the preferred one first."""

from typing import Any

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops._triton import dtype_unavailable, triton_unavailable
from linvis_ops.layer_norm.reference import layer_norm_backward, layer_norm_forward

# A token is in the registers of one program.
MOST_CHANNELS = 8192
# The kernels count tokens in 32 bits.
MOST_TOKENS = 2**30


def kernels_unavailable(*tensors: Tensor) -> str | None:
    """Reason why the Triton kernels cannot take these tensors, x (..., C) first, or None."""
    reason = triton_unavailable(*tensors) or dtype_unavailable(*tensors)
    if reason or not tensors:
        return reason
    channels = tensors[0].shape[-1]
    if channels > MOST_CHANNELS:
        return f'its kernels take up to {MOST_CHANNELS} channels, not {channels}'
    if tensors[0].numel() // channels > MOST_TOKENS:
        return 'its kernels take up to 2**30 tokens in all'
    return None


def _triton_forward(*args: Any) -> Tensor:
    from linvis_ops.layer_norm import kernels_triton  # needs triton, which may be absent

    return kernels_triton.layer_norm_forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from linvis_ops.layer_norm import kernels_triton

    return kernels_triton.layer_norm_backward(*args)


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend('triton', kernels_unavailable, _triton_forward, _triton_backward),
    Backend('torch', _always, layer_norm_forward, layer_norm_backward),
)
