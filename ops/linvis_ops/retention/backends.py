"""Backends of retention, the preferred one first."""

from torch import Tensor

from linvis_ops._dispatch import Backend
from linvis_ops.retention.reference import retention_backward, retention_chunked


def _always(*_tensors: Tensor) -> str | None:
    return None


BACKENDS = (Backend('torch', _always, retention_chunked, retention_backward),)
