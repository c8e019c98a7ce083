"""What our operators are measured beside: a copy, softmax attention, kernels of other libraries."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from benchmarks.passes import Copies, Function, Runnable, Shape, tokens
from linvis_ops.testing import bi_gla_inputs, retention_inputs

HEAD_WIDTH = 64
_HALF = (torch.float16, torch.bfloat16)


class UnavailableError(RuntimeError):
    """A rival cannot run here, or not at this shape and dtype; the message says why."""


@dataclass(frozen=True)
class Rival:
    """Something to measure an operator beside.

    Attributes:
        name: Its name in the rows.
        prepare: Takes the shape, the dtype, the device and the operator's least traffic by pass;
            returns what can be timed. Raises UnavailableError.
    """

    name: str
    prepare: Callable[[Shape, torch.dtype, str, dict[str, int]], Runnable]


def _copy(_shape: Shape, _dtype: torch.dtype, device: str, traffic: dict[str, int]) -> Runnable:
    return Copies(traffic, device)


# The bound of what is limited by memory: a plain copy of as many bytes as the pass has to move.
COPY = Rival('copy', _copy)


def sdpa(name: str, backend: SDPBackend) -> Rival:
    """Softmax attention of PyTorch over as many tokens, with C / 64 heads of width 64.

    q, k and v are (B, H, T, 64) views of (B, T, C) tensors, as projections give them. C of an
    operator with heads is the width of all its values.

    Args:
        name: Its name in the rows.
        backend: The only backend that may run.
    """

    def prepare(
        shape: Shape, dtype: torch.dtype, device: str, _traffic: dict[str, int]
    ) -> Runnable:
        if dtype not in _HALF:
            raise UnavailableError(f'it takes float16 and bfloat16, not {dtype}')
        channels = shape['C'] if 'C' in shape else shape['H'] * shape['V']
        if channels % HEAD_WIDTH:
            raise UnavailableError(f'{channels} channels are no multiple of {HEAD_WIDTH}')
        heads = channels // HEAD_WIDTH
        size = (shape['B'], tokens(shape), heads, HEAD_WIDTH)
        q, k, v = (torch.randn(size, dtype=dtype, device=device).requires_grad_() for _ in range(3))

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                )

        return Function(forward, (q, k, v))

    return Rival(name, prepare)


SDPA = (
    sdpa('sdpa_cudnn', SDPBackend.CUDNN_ATTENTION),
    sdpa('sdpa_flash', SDPBackend.FLASH_ATTENTION),
)


def imported(module: str, package: str, name: str) -> Any:
    """A function of a library that may be absent.

    Args:
        module: Where it is.
        package: What a user would install.
        name: The function.

    Raises:
        UnavailableError: If the library or the function is not there.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f'{package} cannot be used ({error})') from None


def _fla_rwkv4(shape: Shape, dtype: torch.dtype, device: str, _traffic: dict[str, int]) -> Runnable:
    wkv = imported('fla.ops.rwkv4.fused_recurrent', 'fla-core', 'fused_recurrent_rwkv4')
    batch, tokens, channels = (shape[axis] for axis in 'BTC')
    w, u = (torch.randn(channels, device=device).requires_grad_() for _ in range(2))
    k, v = (
        torch.randn(batch, tokens, channels, dtype=dtype, device=device).requires_grad_()
        for _ in range(2)
    )
    state = torch.zeros(batch, 3, 1, channels, device=device)  # two sums and their maximum

    def forward() -> Tensor:
        y, _ = wkv(w, u, k, v, state)
        reversed_y, _ = wkv(w, u, k.flip(1), v.flip(1), state)
        return y + reversed_y.flip(1)

    return Function(forward, (w, u, k, v))


# The causal WKV of fla-core run twice, the second time on flipped inputs, and the outputs added:
# the two recurrences of Bi-WKV, though not its quotient.
FLA_RWKV4_TWICE = Rival('fla_rwkv4_x2', _fla_rwkv4)


def _fla_gla(shape: Shape, dtype: torch.dtype, device: str, _traffic: dict[str, int]) -> Runnable:
    gla = imported('fla.ops.gla', 'fla-core', 'chunk_gla')
    batch, tokens, heads, keys, values = (shape[axis] for axis in 'BTHKV')
    inputs = bi_gla_inputs(batch, tokens, heads, keys, values, dtype, device)

    def forward() -> Tensor:
        q, k, v, g_fwd, g_bwd = inputs
        o, _ = gla(q=q, k=k, v=v, g=g_fwd)
        reversed_o, _ = gla(q=q.flip(1), k=k.flip(1), v=v.flip(1), g=g_bwd.flip(1))
        return (o + reversed_o.flip(1)) / 2

    return Function(forward, inputs)


# The causal gated linear attention of fla-core, run once each way as above: this operator.
FLA_GLA_TWICE = Rival('fla_gla_x2', _fla_gla)


def _fla_gla_stacked(
    shape: Shape, dtype: torch.dtype, device: str, _traffic: dict[str, int]
) -> Runnable:
    gla = imported('fla.ops.gla', 'fla-core', 'chunk_gla')
    batch, tokens, heads, keys, values = (shape[axis] for axis in 'BTHKV')
    inputs = bi_gla_inputs(batch, tokens, heads, keys, values, dtype, device)

    def forward() -> Tensor:
        q, k, v, g_fwd, g_bwd = inputs
        q, k, v = (torch.cat((x, x.flip(1))) for x in (q, k, v))
        o, _ = gla(q=q, k=k, v=v, g=torch.cat((g_fwd, g_bwd.flip(1))))
        o, reversed_o = o.chunk(2)
        return (o + reversed_o.flip(1)) / 2

    return Function(forward, inputs)


# The same in one run over the inputs and their reversed copies, stacked along the batch, as the
# authors of ViG train.
FLA_GLA_STACKED = Rival('fla_gla_stacked', _fla_gla_stacked)


def _fla_retention(
    shape: Shape, dtype: torch.dtype, device: str, _traffic: dict[str, int]
) -> Runnable:
    retention = imported('fla.ops.retention', 'fla-core', 'chunk_retention')
    batch, tokens, heads, keys, values = (shape[axis] for axis in 'BTHKV')
    q, k, v, _ = retention_inputs(batch, tokens, heads, keys, values, dtype, device)
    return Function(lambda: retention(q=q, k=k, v=v)[0], (q, k, v))


# The causal retention of fla-core. Its decays are those of RetNet, 1 - 2^-5 for the first head and
# nearer to 1 for each that follows.
FLA_RETENTION = Rival('fla_retention', _fla_retention)


def torch_norm(name: str, function: Callable[..., Tensor], weights: int) -> Rival:
    """A norm of PyTorch, with float32 weights as layers have them, cast to the dtype of x.

    Args:
        name: Its name in the rows.
        function: Takes x, the shape that is normalised and the weights.
        weights: Number of weights.
    """

    def prepare(
        shape: Shape, dtype: torch.dtype, device: str, _traffic: dict[str, int]
    ) -> Runnable:
        size = shape['C']
        x = torch.randn(shape['B'], shape['T'], size, dtype=dtype, device=device).requires_grad_()
        given = tuple(torch.rand(size, device=device).requires_grad_() for _ in range(weights))
        return Function(
            lambda: function(x, (size,), *(weight.to(dtype) for weight in given)), (x, *given)
        )

    return Rival(name, prepare)


TORCH_LAYER_NORM = torch_norm('torch_layer_norm', layer_norm, weights=2)
TORCH_RMS_NORM = torch_norm('torch_rms_norm', rms_norm, weights=1)
