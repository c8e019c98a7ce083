"""torch.library registration of Bi-WKV: linvis::bi_wkv_fwd and linvis::bi_wkv_bwd."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvis_ops import _dispatch
from linvis_ops._library import custom_op
from linvis_ops.bi_wkv.backends import BACKENDS
from linvis_ops.bi_wkv.reference import accumulation_dtype

_dispatch.register_backends('bi_wkv', BACKENDS)


@custom_op('bi_wkv_fwd')
def bi_wkv_fwd(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Forward operator: y in the dtype of v, and the log denominator in the accumulation dtype."""
    return _dispatch.select('bi_wkv', backend, k, v, w, u).forward(w, u, k, v)


@bi_wkv_fwd.register_fake
def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return v.new_empty(v.shape), v.new_empty(v.shape, dtype=accumulation_dtype(v.dtype))


@custom_op('bi_wkv_bwd')
def bi_wkv_bwd(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward operator: gradients by w, u, k and v; deterministic."""
    return _dispatch.select('bi_wkv', backend, k, v, w, u).backward(gy, w, u, k, v, y, lse)


@bi_wkv_bwd.register_fake
def _(
    gy: Tensor,  # noqa: ARG001
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    w, u, k, v, backend = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(w, u, k, v, y, lse)
    ctx.backend = backend


def _backward(ctx: Any, gy: Tensor, _glse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *bi_wkv_bwd(gy, *ctx.saved_tensors, ctx.backend), None


torch.library.register_autograd('linvis::bi_wkv_fwd', _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvis.bi_wkv_fwd)
def _forward_flops(_w: Any, _u: Any, k_shape: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    # 13 operations an element: the recurrent form of the paper (equation 8)
    return 13 * k_shape.numel()


@register_flop_formula(torch.ops.linvis.bi_wkv_bwd)
def _backward_flops(_gy: Any, _w: Any, _u: Any, k_shape: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    # twice the forward pass: two sums and their two moments instead of two sums
    return 26 * k_shape.numel()
