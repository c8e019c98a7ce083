"""Bi-WKV of the CUDA extension `linvis_ops._C`, which is built on request."""

import functools
import importlib

import torch
from torch import Tensor

from linvis_ops._triton import dtype_unavailable


@functools.cache
def extension_error() -> str | None:
    """Why the extension cannot be used, or None; importing it registers `torch.ops.linvis_cuda`."""
    try:
        importlib.import_module('linvis_ops._C')
    except ModuleNotFoundError:
        return 'linvis_ops was installed without its CUDA extension; build with LINVIS_BUILD_CUDA=1'
    except ImportError as error:
        return f'its CUDA extension cannot be loaded ({error}); build it again for this PyTorch'
    return None


def cuda_unavailable(*tensors: Tensor) -> str | None:
    """Reason why the CUDA kernels cannot take these tensors, or None.

    Args:
        tensors: Inputs of the operator; none to ask about the machine alone.

    Returns:
        None if they can run, else a clause that says why not.
    """
    error = extension_error()
    if error:
        return error
    if not torch.cuda.is_available():
        return 'there is no CUDA device'
    for tensor in tensors:
        if tensor.device.type != 'cuda':
            return f'the inputs are on {tensor.device.type}'
    return dtype_unavailable(*tensors)


def bi_wkv_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output (B, T, C), contiguous, in the dtype of v."""
    return torch.ops.linvis_cuda.bi_wkv_fwd(w, u, k, v)


def bi_wkv_backward(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by w and u (float32, summed in a fixed order), k and v (in their dtype)."""
    return torch.ops.linvis_cuda.bi_wkv_bwd(gy, w, u, k, v)
