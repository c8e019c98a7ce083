"""Whether Triton kernels can run here, with the reason where they cannot."""

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module('triton')
    except ImportError as error:
        return f'triton cannot be imported ({error})'
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    if _import_error():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def triton_unavailable(*tensors: Tensor) -> str | None:
    """Reason why Triton kernels cannot take these tensors, or None.

    Args:
        tensors: Inputs of the operator; none to ask about the machine alone.

    Returns:
        None if they can run, else a clause that says why not.
    """
    error = _import_error()
    if error:
        return error
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return 'there is no CUDA device'
    for tensor in tensors:
        if tensor.device.type != 'cuda':
            return f'the inputs are on {tensor.device.type}'
    return None


def dtype_unavailable(*tensors: Tensor) -> str | None:
    """Reason why kernels that accumulate in float32 cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f'its kernels take float32, float16 and bfloat16, not {tensor.dtype}'
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which kernels launch on the tensor's device, not on the current one."""
    if tensor.device.type == 'cuda':
        return torch.cuda.device(tensor.device)
    return nullcontext()
