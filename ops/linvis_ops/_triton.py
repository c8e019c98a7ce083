"""Whether Triton kernels can run here, with the reason where they cannot."""

import functools
import importlib
import subprocess
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# What kernels that accumulate in float32 take.
KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
_HERE = nullcontext()


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


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1).

    The first answer is kept: Triton itself decides when a kernel is defined.
    """
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
    # a tensor on a GPU says that there is one, in less time than PyTorch does
    if not (tensors and tensors[0].is_cuda) and not torch.cuda.is_available():
        return 'there is no CUDA device'
    for tensor in tensors:
        if not tensor.is_cuda:
            return f'the inputs are on {tensor.device.type}'
    return _start_error()


def dtype_unavailable(*tensors: Tensor) -> str | None:
    """Reason why kernels that accumulate in float32 cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            return f'its kernels take float32, float16 and bfloat16, not {tensor.dtype}'
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which kernels launch on the tensor's device, not on the current one."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE
