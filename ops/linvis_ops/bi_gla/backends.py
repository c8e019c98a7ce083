"""Backends of bidirectional gated linear attention, the preferred one first."""

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops.bi_gla.reference import bi_gla_backward, bi_gla_chunked


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (Backend('torch', _always, bi_gla_chunked, bi_gla_backward),)
