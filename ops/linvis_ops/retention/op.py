"""torch.library registration of retention: linvis::retention_fwd, linvis::retention_bwd."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvis_ops import _dispatch
from linvis_ops._library import custom_op, without_autocast
from linvis_ops.retention.backends import BACKENDS

_dispatch.register_backends('retention', BACKENDS)


@custom_op('retention_fwd')
def retention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int,
    bidirectional: bool,
    scale: float | None,
    backend: str,
) -> Tensor:
    """Forward operator: the output in the dtype of v."""
    chosen = _dispatch.select('retention', backend, q, k, v, log_gamma)
    with without_autocast(q):
        return chosen.forward(q, k, v, log_gamma, columns, bidirectional, scale)


@retention_fwd.register_fake
def _(
    q: Tensor,  # noqa: ARG001
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    log_gamma: Tensor,  # noqa: ARG001
    columns: int,  # noqa: ARG001
    bidirectional: bool,  # noqa: ARG001
    scale: float | None,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> Tensor:
    return v.new_empty(v.shape)


@custom_op('retention_bwd')
def retention_bwd(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int,
    bidirectional: bool,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward operator: gradients by q, k and v; deterministic."""
    chosen = _dispatch.select('retention', backend, q, k, v, log_gamma, go)
    with without_autocast(q):
        return chosen.backward(go, q, k, v, log_gamma, columns, bidirectional, scale)


@retention_bwd.register_fake
def _(
    go: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,  # noqa: ARG001
    columns: int,  # noqa: ARG001
    bidirectional: bool,  # noqa: ARG001
    scale: float | None,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.columns, ctx.bidirectional, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
    rest = (ctx.columns, ctx.bidirectional, ctx.scale, ctx.backend)
    return *retention_bwd(go, *ctx.saved_tensors, *rest), None, None, None, None, None


retention_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvis.retention_fwd)
def _forward_flops(
    q_shape: torch.Size,
    _k: Any,
    v_shape: torch.Size,
    _log_gamma: Any,
    columns: int,
    bidirectional: bool,
    *_args: Any,
    **_kwargs: Any,
) -> int:
    # For each token, direction and element of the K x V state: its decay 1, k v^T added to it 2,
    # q read from it 2; on a grid the running sum over the columns 2. This is the recurrent form,
    # whatever form runs.
    operations = 7 if columns > 1 else 5
    return (2 if bidirectional else 1) * operations * q_shape.numel() * v_shape[-1]


@register_flop_formula(torch.ops.linvis.retention_bwd)
def _backward_flops(
    _go: Any,
    q_shape: torch.Size,
    _k: Any,
    v_shape: torch.Size,
    _log_gamma: Any,
    columns: int,
    bidirectional: bool,
    *_args: Any,
    **_kwargs: Any,
) -> int:
    # the state again 3, its gradient likewise 3, on a grid their running sums 2 each, and a product
    # of 2 for dq, dk and dv each
    operations = 16 if columns > 1 else 12
    return (2 if bidirectional else 1) * operations * q_shape.numel() * v_shape[-1]
