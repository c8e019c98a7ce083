"""Backends of Bi-WKV, the preferred one first."""

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops._triton import dtype_unavailable, triton_unavailable
from linvis_ops.bi_wkv import cuda
from linvis_ops.bi_wkv.reference import bi_wkv_backward, bi_wkv_chunked


def _triton_unavailable(*tensors: Tensor) -> str | None:
    return triton_unavailable(*tensors) or dtype_unavailable(*tensors)


def _triton_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from linvis_ops.bi_wkv import kernels_triton  # needs triton, which may be absent

    return kernels_triton.bi_wkv_forward(w, u, k, v)


def _triton_backward(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from linvis_ops.bi_wkv import kernels_triton_backward

    return kernels_triton_backward.bi_wkv_backward(gy, w, u, k, v)


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend('triton', _triton_unavailable, _triton_forward, _triton_backward),
    # It leads where a streaming kernel takes the pass. Elsewhere it is behind Triton, which was
    # faster in all backward passes that were measured (README.md); forward it was often slower, but
    # of passes that no streaming kernel takes hardly any were measured.
    Backend(
        'cuda',
        cuda.cuda_unavailable,
        cuda.bi_wkv_forward,
        cuda.bi_wkv_backward,
        leads=cuda.leads,
    ),
    Backend('torch', _always, bi_wkv_chunked, bi_wkv_backward),
)
