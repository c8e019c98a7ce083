"""torch.library registration of Q-Shift: linvis::q_shift, whose gradient is its adjoint form."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvis_ops import _dispatch
from linvis_ops._library import custom_op
from linvis_ops.q_shift.backends import BACKENDS

_dispatch.register_backends('q_shift', BACKENDS)


@custom_op('q_shift')
def q_shift(x: Tensor, rows: int, columns: int, heads: int, adjoint: bool, backend: str) -> Tensor:
    """Shift x, or apply the adjoint of the shift."""
    chosen = _dispatch.select('q_shift', backend, x)
    implementation = chosen.backward if adjoint else chosen.forward
    return implementation(x, rows, columns, heads)


@q_shift.register_fake
def _(
    x: Tensor,
    rows: int,  # noqa: ARG001
    columns: int,  # noqa: ARG001
    heads: int,  # noqa: ARG001
    adjoint: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, *ctx.geometry, ctx.adjoint, ctx.backend = inputs


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    return q_shift(gy, *ctx.geometry, not ctx.adjoint, ctx.backend), None, None, None, None, None


q_shift.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvis.q_shift)
def _flops(*_args: Any, **_kwargs: Any) -> int:
    return 0  # it only moves data
