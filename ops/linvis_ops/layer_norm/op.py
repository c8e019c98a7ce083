"""torch.library registration: linvis::layer_norm_fwd and linvis::layer_norm_bwd."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvis_ops import _dispatch
from linvis_ops._library import custom_op, without_autocast
from linvis_ops.layer_norm.backends import BACKENDS

_dispatch.register_backends('layer_norm', BACKENDS)


@custom_op('layer_norm_fwd')
def layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    """Forward operator."""
    given = (x, weight) if bias is None else (x, weight, bias)
    chosen = _dispatch.select('layer_norm', backend, *given)
    with without_autocast(x):
        return chosen.forward(x, weight, bias, eps, centred, dtype or x.dtype)


@layer_norm_fwd.register_fake
def _(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    centred: bool,  # noqa: ARG001
    dtype: torch.dtype | None,
    backend: str,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


@custom_op('layer_norm_bwd')
def layer_norm_bwd(
    gy: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward operator: gradients by x, weight and bias, the last two wide; deterministic."""
    chosen = _dispatch.select('layer_norm', backend, x, weight, gy)
    with without_autocast(x):
        return chosen.backward(gy, x, weight, eps, centred)


@layer_norm_bwd.register_fake
def _(
    gy: Tensor,  # noqa: ARG001
    x: Tensor,
    weight: Tensor,
    eps: float,  # noqa: ARG001
    centred: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = (weight.new_empty(weight.shape, dtype=wide) for _ in range(2))
    return x.new_empty(x.shape), dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, bias, ctx.eps, ctx.centred, _dtype, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = layer_norm_bwd(gy, x, weight, ctx.eps, ctx.centred, ctx.backend)
    by_bias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dx, dweight.to(weight.dtype), by_bias, *[None] * 4


layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.linvis.layer_norm_fwd, torch.ops.linvis.layer_norm_bwd])
def _flops(*_args: Any, **_kwargs: Any) -> int:
    return 0  # norms, of which PyTorch's counter counts none
