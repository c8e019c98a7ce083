"""Registration of operators under torch.ops.linvis; a name is defined once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

NAMESPACE = 'linvis'

Function = TypeVar('Function', bound=Callable[..., Any])


def custom_op(name: str) -> Callable[[Function], Any]:
    """Register a function as operator `linvis::name` without side effects on its arguments.

    PyTorch accepts a second definition of a name silently and mixes the two; this raises instead.

    Args:
        name: Name of the operator inside the namespace.

    Returns:
        A decorator that turns the function into a `torch.library.CustomOpDef`.

    Raises:
        RuntimeError: If the name is defined already, which means that linvis_ops was imported
            twice.
    """

    def register(function: Function) -> Any:
        if hasattr(getattr(torch.ops, NAMESPACE), name):
            raise RuntimeError(
                f'operator {NAMESPACE}::{name} is defined already: linvis_ops was imported under '
                f'two names or from two folders; keep one.'
            )
        return torch.library.custom_op(f'{NAMESPACE}::{name}', function, mutates_args=())

    return register


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which an operator's own arithmetic keeps its dtypes, which the inputs' set."""
    # the meta device cannot be asked
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
