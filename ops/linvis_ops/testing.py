"""Inputs, tolerances and comparisons shared by tests and benchmarks."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# Least error that is asked for, by dtype: relative root mean square against float64 on the same
# (rounded) inputs.
FLOORS = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}
# The largest single error may be this many times the bound on the relative root mean square, in
# units of max |reference|.
WORST_ELEMENT = 8.0


def relative_rms(actual: Tensor, reference: Tensor) -> float:
    """Root mean square of the error over that of the reference (over 1 where that is zero)."""
    reference = reference.double()
    error = (actual.double() - reference).square().mean().sqrt().item()
    size = reference.square().mean().sqrt().item()
    return error / size if size else error


def assert_matches(
    name: str,
    actual: Tensor,
    reference: Tensor,
    plain: Tensor | None,
    dtype: torch.dtype,
    factor: float = 2.0,
    floor: float | None = None,
) -> None:
    """Raise AssertionError unless a result is as near to the float64 reference as its dtype allows.

    Args:
        name: What is compared, for the message.
        actual: Result under test.
        reference: The same in float64.
        plain: The same by plain PyTorch in the tested dtype. None: the floor alone counts.
        dtype: The tested dtype, which chooses the floor: of a gradient its own.
        factor: So many times the error of `plain` is allowed.
        floor: Instead of the dtype's.
    """
    assert actual.shape == reference.shape, (
        f'{name}: shape {actual.shape}, expected {reference.shape}'
    )
    finite = torch.isfinite(reference)
    assert torch.equal(torch.isfinite(actual), finite), f'{name}: not finite where the reference is'
    bound = FLOORS[dtype] if floor is None else floor
    if plain is not None:
        bound = max(bound, factor * relative_rms(plain, reference))
    error = (actual.double() - reference.double()).abs()
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
    where = f'{name} ({dtype}, {tuple(actual.shape)}): worst element {index}'
    r = relative_rms(actual, reference)
    assert r <= bound, f'{where}: relative rms error {r:.3g} exceeds {bound:.3g}'
    limit = WORST_ELEMENT * bound * max(reference.abs().max().item(), torch.finfo(dtype).tiny)
    largest = error.max().item()
    zero = not reference.any()
    assert largest <= (bound if zero else limit), (
        f'{where}: error {largest:.3g} exceeds {limit:.3g}'
    )


def gradients(outputs: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of (outputs * grad).sum() by every input."""
    return torch.autograd.grad(outputs, inputs, grad.to(outputs.dtype))


def bi_wkv_inputs(
    batch: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: str = 'cpu',
    *,
    key_scale: float = 2.0,
    decay: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w, u, k, v as a layer gives them; all require gradients.

    Args:
        batch: B.
        tokens: T.
        channels: C.
        dtype: Dtype of k and v.
        device: Where the tensors are made.
        key_scale: Standard deviation of k.
        decay: Bound of |w| a token; None: raw decays of -5 to 3 over the whole sequence, as at
            initialisation.
        seed: Of the random numbers.
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    side = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(channels, generator=generator, dtype=side)

    w = uniform(-5.0, 3.0) / tokens if decay is None else uniform(-decay, decay)
    u = uniform(-1.0, 1.0)
    k = key_scale * torch.randn(batch, tokens, channels, generator=generator, dtype=side)
    v = torch.randn(batch, tokens, channels, generator=generator, dtype=side)
    w, u, k, v = (t.to(device) for t in (w, u, k.to(dtype), v.to(dtype)))
    return tuple(t.requires_grad_() for t in (w, u, k, v))  # type: ignore[return-value]


def bi_gla_inputs(
    batch: int,
    tokens: int,
    heads: int,
    key_width: int,
    value_width: int,
    dtype: torch.dtype = torch.float32,
    device: str = 'cpu',
    *,
    gate: float | str | None = None,
    gate_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, g_fwd, g_bwd as a layer gives them; all require gradients.

    Args:
        batch: B.
        tokens: T.
        heads: H.
        key_width: K.
        value_width: V.
        dtype: Dtype of q, k and v.
        device: Where the tensors are made.
        gate: Every log gate; None: logsigmoid(x) / 16 of normal x, as at initialisation; 'mixed':
            such ones, some of them a hundred times, shut (-20) and open (0) ones by turns.
        gate_dtype: Dtype of the gates; None: that of q.
        seed: Of the random numbers.
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    side = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(width: int) -> Tensor:
        return torch.randn(batch, tokens, heads, width, generator=generator, dtype=side)

    q, k, v = (normal(width).to(device, dtype) for width in (key_width, key_width, value_width))
    gates = [torch.nn.functional.logsigmoid(normal(key_width)) / 16 for _ in range(2)]
    if isinstance(gate, float):
        gates = [torch.full_like(each, gate) for each in gates]
    elif gate is not None:
        kinds = [torch.rand(each.shape, generator=generator) for each in gates]
        gates = [
            torch.where(kind < 0.3, -20.0, torch.where(kind < 0.5, 0.0, each))
            * torch.where(kind > 0.8, 100.0, 1.0)
            for kind, each in zip(kinds, gates, strict=True)
        ]
    g_fwd, g_bwd = (each.to(device, gate_dtype or dtype) for each in gates)
    return tuple(t.requires_grad_() for t in (q, k, v, g_fwd, g_bwd))  # type: ignore[return-value]


def retention_inputs(
    batch: int,
    tokens: int,
    heads: int,
    key_width: int,
    value_width: int,
    dtype: torch.dtype = torch.float32,
    device: str = 'cpu',
    *,
    gamma: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, log_gamma as a layer gives them; all but log_gamma require gradients.

    Args:
        batch: B.
        tokens: T.
        heads: H.
        key_width: K.
        value_width: V.
        dtype: Dtype of q, k and v.
        device: Where the tensors are made.
        gamma: Decay of every head; None: those of ViR, 1 - 1/32 to 1 - 1/512.
        seed: Of the random numbers.
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    side = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (
        torch.randn(batch, tokens, heads, width, generator=generator, dtype=side).to(device, dtype)
        for width in (key_width, key_width, value_width)
    )
    far = torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=torch.float64)
    decay = 1 - far.exp() if gamma is None else torch.full_like(far, gamma)
    tokens_first = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    return *tokens_first, decay.log().to(device, side)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that an unwritten element shows.

    Tensors that C++ code makes, too: PyTorch fills those in its deterministic mode, unless
    torch.utils.deterministic.fill_uninitialized_memory is off. Some operators warn in that mode.
    """

    def poisoned(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = function(*args, **kwargs)
            return tensor.fill_(float('nan')) if tensor.is_floating_point() else tensor

        return call

    functions = {
        torch: ('empty', 'empty_like', 'empty_permuted', 'empty_strided'),
        torch.Tensor: ('new_empty', 'new_empty_strided'),
    }
    # torch.device() as a context collects the functions that it acts on at its first use: they must
    # be the real ones
    with torch.device('cpu'):
        torch.empty(0)
    with ExitStack() as stack:
        for owner, names in functions.items():
            for name in names:
                patch = mock.patch.object(owner, name, poisoned(getattr(owner, name)))
                stack.enter_context(patch)
        stack.enter_context(_deterministic())
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic mode, with warnings only."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
