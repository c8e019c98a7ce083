"""Whether Triton kernels can run here, with the reason where they cannot."""

import functools
import importlib
import subprocess
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


@functools.cache
def _start_error() -> str | None:
    """Why Triton cannot launch kernels: it builds a small C module at its first launch."""
    import triton

    try:
        triton.runtime.driver.active.get_current_device()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        reason = str(error).strip().split('\n')[0]
        return f'triton cannot start ({reason}); it needs gcc or clang and the headers of Python'
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
    return _start_error()


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
