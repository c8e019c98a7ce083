"""torch.library registration: linvis::q_shift_mix_fwd and linvis::q_shift_mix_bwd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvis_ops import _dispatch
from linvis_ops._library import custom_op, without_autocast
from linvis_ops.q_shift_mix.backends import BACKENDS

_dispatch.register_backends('q_shift_mix', BACKENDS)


@custom_op('q_shift_mix_fwd')
def q_shift_mix_fwd(
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: int,
    columns: int,
    heads: int,
    dtype: torch.dtype | None,
    backend: str,
) -> list[Tensor]:
    """Forward operator: the mixes, then the statistics (2, B, T) of the norm if there is one."""
    # the backward pass is given gradients of this dtype
    mixes = [x.new_empty(0, dtype=dtype)] if dtype == torch.float64 else []
    chosen = _dispatch.select('q_shift_mix', backend, x, *mus, *mixes)
    with without_autocast(x):
        return chosen.forward(x, mus, weight, bias, eps, rows, columns, heads, dtype or x.dtype)


@q_shift_mix_fwd.register_fake
def _(
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    rows: int,  # noqa: ARG001
    columns: int,  # noqa: ARG001
    heads: int,  # noqa: ARG001
    dtype: torch.dtype | None,
    backend: str,  # noqa: ARG001
) -> list[Tensor]:
    mixes = [x.new_empty(x.shape, dtype=dtype or x.dtype) for _ in mus]
    return mixes if weight is None else [*mixes, mus[0].new_empty((2, *x.shape[:2]))]


@custom_op('q_shift_mix_bwd')
def q_shift_mix_bwd(
    grads: Sequence[Tensor],
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Backward operator: gradient by x, and by mus, weight and bias as rows; deterministic."""
    chosen = _dispatch.select('q_shift_mix', backend, x, *mus, *grads)
    with without_autocast(x):
        return chosen.backward(grads, x, mus, weight, bias, stats, rows, columns, heads)


@q_shift_mix_bwd.register_fake
def _(
    grads: Sequence[Tensor],  # noqa: ARG001
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,  # noqa: ARG001
    stats: Tensor | None,  # noqa: ARG001
    rows: int,  # noqa: ARG001
    columns: int,  # noqa: ARG001
    heads: int,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    parameters = len(mus) + (0 if weight is None else 2)
    return x.new_empty(x.shape), mus[0].new_empty((parameters, x.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, mus, weight, bias, _eps, *ctx.geometry, _dtype, ctx.backend = inputs
    ctx.dtype = output[0].dtype
    stats = output[-1] if weight is not None else None
    if stats is not None:
        ctx.mark_non_differentiable(stats)
    # no zeros for the statistics
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, stats, *mus)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, weight, bias, stats, *mus = ctx.saved_tensors
    used = [x.new_zeros(x.shape, dtype=ctx.dtype) if g is None else g for g in grads[: len(mus)]]
    dx, rows = q_shift_mix_bwd(used, x, mus, weight, bias, stats, *ctx.geometry, ctx.backend)
    dmus = list(rows[: len(mus)].unbind())
    dweight, dbias = (None, None) if weight is None else rows[len(mus) :].unbind()
    return dx, dmus, dweight, dbias, *[None] * 6


q_shift_mix_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.linvis.q_shift_mix_fwd, torch.ops.linvis.q_shift_mix_bwd])
def _flops(*_args: Any, **_kwargs: Any) -> int:
    return 0  # pointwise work and norms, of which PyTorch's counter counts none
