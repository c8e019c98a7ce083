"""torch.library registration of gated linear attention: linvis::bi_gla_fwd, linvis::bi_gla_bwd."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvis_ops import _dispatch
from linvis_ops._library import custom_op, without_autocast
from linvis_ops.bi_gla.backends import BACKENDS

_dispatch.register_backends('bi_gla', BACKENDS)


@custom_op('bi_gla_fwd')
def bi_gla_fwd(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float | None, backend: str
) -> Tensor:
    """Forward operator: the output in the dtype of v."""
    chosen = _dispatch.select('bi_gla', backend, q, k, v, g_fwd, g_bwd)
    with without_autocast(q):
        return chosen.forward(q, k, v, g_fwd, g_bwd, scale)


@bi_gla_fwd.register_fake
def _(
    q: Tensor,  # noqa: ARG001
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    g_fwd: Tensor,  # noqa: ARG001
    g_bwd: Tensor,  # noqa: ARG001
    scale: float | None,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> Tensor:
    return v.new_empty(v.shape)


@custom_op('bi_gla_bwd')
def bi_gla_bwd(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward operator: gradients by q, k, v, g_fwd and g_bwd; deterministic."""
    chosen = _dispatch.select('bi_gla', backend, q, k, v, g_fwd, g_bwd, go)
    with without_autocast(q):
        return chosen.backward(go, q, k, v, g_fwd, g_bwd, scale)


@bi_gla_bwd.register_fake
def _(
    go: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        g_fwd.new_empty(g_fwd.shape),
        g_bwd.new_empty(g_bwd.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
    return *bi_gla_bwd(go, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None


bi_gla_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvis.bi_gla_fwd)
def _forward_flops(
    q_shape: torch.Size, _k: Any, v_shape: torch.Size, *_args: Any, **_kwargs: Any
) -> int:
    # For each token, direction and element of the K x V state: its decay 1, k v^T added to it 2,
    # q read from it 2. This is the recurrent form, whatever form runs.
    return 2 * 5 * q_shape.numel() * v_shape[-1]


@register_flop_formula(torch.ops.linvis.bi_gla_bwd)
def _backward_flops(
    _go: Any, q_shape: torch.Size, _k: Any, v_shape: torch.Size, *_args: Any, **_kwargs: Any
) -> int:
    # the state again 3, its gradient likewise 3, and a product of 2 for dq, dk and dv each;
    # the gates' gradient follows from q, dq, k, dk by K operations a token, which are left out
    return 2 * 12 * q_shape.numel() * v_shape[-1]
