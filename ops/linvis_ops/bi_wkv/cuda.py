"""Bi-WKV of the CUDA extension `linvis_ops._C`, which is built on request."""

import functools
import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from linvis_ops._triton import dtype_unavailable
from linvis_ops.bi_wkv.launch import rules_of


@dataclass(frozen=True)
class Streaming:
    """Sequences for which a streaming kernel is used.

    Attributes:
        least_tokens: Shorter sequences leave its rows empty.
        most_tokens: In longer ones too many segments ask for the sums of all others.
        segment: Tokens of its segments.
        fastest_up_to: Tokens up to which it was measured to be faster than Triton's.
    """

    least_tokens: int
    most_tokens: int
    segment: int
    fastest_up_to: int


# README.md of this folder, Implementation in CUDA.
FORWARD = Streaming(least_tokens=100, most_tokens=32768, segment=256, fastest_up_to=16384)
BACKWARD = Streaming(least_tokens=150, most_tokens=28672, segment=224, fastest_up_to=28672)
# Compute capabilities on which these limits were measured.
MEASURED = {(9, 0)}


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
    if tensors and torch.cuda.get_device_capability(tensors[0].device) < (8, 0):
        return 'its kernels need a GPU of compute capability 8.0 or newer'
    return dtype_unavailable(*tensors)


def _is_whole(x: Tensor) -> bool:
    """Whether the rows of x (B, T, C), of numbers of two bytes, are made of aligned 16 bytes."""
    steps = (x.stride(0), x.stride(1), x.shape[2])
    return x.stride(2) == 1 and not any(n % 8 for n in steps) and x.data_ptr() % 16 == 0


def streams(k: Tensor, v: Tensor, gy: Tensor | None = None) -> bool:
    """Whether a streaming kernel takes the pass of these tokens.

    Args:
        k: Keys (B, T, C).
        v: Values (B, T, C).
        gy: Gradient by y, (B, T, C), of the backward pass. None: the forward pass.

    Returns:
        True for float16 and bfloat16 on a GPU in whole rows, of sequences for which it pays and
        whose segments can all be at work at once.
    """
    limits, rows = (FORWARD, (k, v)) if gy is None else (BACKWARD, (k, v, gy))
    if v.device.type != 'cuda' or v.dtype not in (torch.float16, torch.bfloat16):
        return False
    tokens = v.shape[1]
    if not limits.least_tokens <= tokens <= limits.most_tokens or not all(map(_is_whole, rows)):
        return False
    _, multiprocessors = rules_of(v.device)
    return tokens <= limits.segment * multiprocessors


def leads(k: Tensor, v: Tensor, _w: Tensor, _u: Tensor, gy: Tensor | None = None) -> bool:
    """Whether these kernels are faster than Triton's: where a streaming one was measured to be."""
    limits = FORWARD if gy is None else BACKWARD
    return (
        streams(k, v, gy)
        and v.shape[1] <= limits.fastest_up_to
        and torch.cuda.get_device_capability(v.device) in MEASURED
    )


def bi_wkv_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output (B, T, C), contiguous, in the dtype of v."""
    if streams(k, v):
        return torch.ops.linvis_cuda.bi_wkv_stream_fwd(w, u, k, v)
    return torch.ops.linvis_cuda.bi_wkv_fwd(w, u, k, v)


def bi_wkv_backward(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by w and u (float32, summed in a fixed order), k and v (in their dtype)."""
    if streams(k, v, gy):
        return torch.ops.linvis_cuda.bi_wkv_stream_bwd(gy, w, u, k, v)
    return torch.ops.linvis_cuda.bi_wkv_bwd(gy, w, u, k, v)
