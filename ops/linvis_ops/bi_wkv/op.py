"""torch.library registration of Bi-WKV: linvis::bi_wkv_fwd and linvis::bi_wkv_bwd."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvis_ops import _dispatch
from linvis_ops._library import custom_op, without_autocast
from linvis_ops.bi_wkv.backends import BACKENDS

_dispatch.register_backends('bi_wkv', BACKENDS)


@custom_op('bi_wkv_fwd')
def bi_wkv_fwd(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Forward operator: y in the dtype of v."""
    chosen = _dispatch.select('bi_wkv', backend, k, v, w, u)
    with without_autocast(k):
        return chosen.forward(w, u, k, v)


@bi_wkv_fwd.register_fake
def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:  # noqa: ARG001
    return v.new_empty(v.shape)


@custom_op('bi_wkv_bwd')
def bi_wkv_bwd(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward operator: gradients by w, u, k and v; deterministic."""
    chosen = _dispatch.select('bi_wkv', backend, k, v, w, u, gy)
    with without_autocast(k):
        return chosen.backward(gy, w, u, k, v)


@bi_wkv_bwd.register_fake
def _(
    gy: Tensor,  # noqa: ARG001
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    return *bi_wkv_bwd(gy, *ctx.saved_tensors, ctx.backend), None


bi_wkv_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvis.bi_wkv_fwd)
def _forward_flops(_w: Any, _u: Any, k_shape: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    # 13 operations an element: the recurrent form of the paper (equation 8)
    return 13 * k_shape.numel()


@register_flop_formula(torch.ops.linvis.bi_wkv_bwd)
def _backward_flops(
    _gy: Any, _w: Any, _u: Any, k_shape: torch.Size, *_args: Any, **_kwargs: Any
) -> int:
    # the forward pass again, then two sums and their two moments instead of two sums
    return 39 * k_shape.numel()
