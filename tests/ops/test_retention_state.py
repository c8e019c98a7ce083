"""Retention of sequences that come in pieces, and the memory that retention takes.

Sizes are B, T, H, K, V, in that order; grids are (rows, columns).
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linvis_ops import retention, retention_with_state
from linvis_ops.retention.reference import (
    retention_backward,
    retention_chunked,
    retention_chunked_with_state,
    retention_parallel,
    retention_recurrent,
)
from linvis_ops.testing import assert_matches, gradients, retention_inputs

F64 = torch.float64
DTYPES = {'f32': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}
GRIDS = [None, (64, 64), (1, 4096), (4096, 1), (4, 1024), (1024, 4)]


def detached(inputs):
    return [t.detach() for t in inputs]


def columns_of(hw):
    return 1 if hw is None else hw[1]


# Pieces


def cuts(total, generator):
    """Ends of pieces, some of them of one step."""
    inner = torch.randperm(total - 1, generator=generator)[: min(4, total - 1)] + 1
    return [0, *sorted(inner.tolist()), total]


def in_pieces(tokens, hw, class_alone, seed):
    """Slices of tokens and their bands, at random."""
    generator = torch.Generator().manual_seed(seed)
    if hw is None:
        ends = cuts(tokens, generator)
        return [(slice(a, b), None) for a, b in itertools.pairwise(ends)]
    rows, columns = hw
    ends = cuts(rows, generator)
    pieces = [
        (slice(a * columns, b * columns), (b - a, columns)) for a, b in itertools.pairwise(ends)
    ]
    if tokens > rows * columns:
        if class_alone:
            pieces.append((slice(tokens - 1, tokens), (0, columns)))
        else:
            last, band = pieces.pop()
            pieces.append((slice(last.start, tokens), band))
    return pieces


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
    ('tokens', 'hw', 'class_alone'),
    [
        (2, None, False), (300, None, False), (60, (12, 5), False), (61, (12, 5), False),
        (61, (12, 5), True), (400, (8, 50), False), (401, (8, 50), True), (9, (9, 1), False),
    ],
)  # fmt: skip
def test_pieces_equal_the_whole(tokens, hw, class_alone, seed):
    q, k, v, log_gamma = inputs = retention_inputs(2, tokens, 2, 3, 4, F64)
    expected = retention(*inputs, hw, backend='reference')
    state, outputs = None, []
    for piece, band in in_pieces(tokens, hw, class_alone, seed):
        given = (t[:, piece] for t in (q, k, v))
        o, state = retention_with_state(*given, log_gamma, band, state)
        outputs.append(o)
    y = torch.cat(outputs, 1)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    columns = () if hw is None else (hw[1],)
    assert state.shape == (2, 2, *columns, 3, 4)
    _, left = retention_recurrent(*detached(inputs), columns_of(hw))
    torch.testing.assert_close(state, left[:, :, 0] if hw is None else left)
    go = torch.randn_like(expected)
    for a, e in zip(gradients(y, inputs[:3], go), gradients(expected, inputs[:3], go), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('hw', [None, (4, 5)])
def test_recurrent_form_goes_on_from_the_state_of_the_chunked_one(hw):
    q, k, v, log_gamma = detached(retention_inputs(2, 20, 2, 3, 4, F64))
    columns = columns_of(hw)
    expected = retention_parallel(q, k, v, log_gamma, columns)
    first, state = retention_chunked_with_state(*(t[:, :10] for t in (q, k, v)), log_gamma, columns)
    second, _ = retention_recurrent(
        *(t[:, 10:] for t in (q, k, v)), log_gamma, columns, state=state
    )
    torch.testing.assert_close(torch.cat([first, second], 1), expected)


@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
def test_state_is_kept_in_float32(dtype):
    q, k, v, log_gamma = detached(retention_inputs(2, 90, 2, 8, 8, dtype))
    expected = retention(*(t.double() for t in (q, k, v, log_gamma)), backend='reference')
    plain = retention(q, k, v, log_gamma, backend='reference')
    state, outputs = None, []
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for piece in (slice(0, 40), slice(40, 41), slice(41, 90)):
            given = (t[:, piece] for t in (q, k, v))
            o, state = retention_with_state(*given, log_gamma, state=state)
            outputs.append(o)
    assert state.dtype == torch.float32
    y = torch.cat(outputs, 1)
    assert y.dtype == dtype
    assert_matches('y', y, expected, plain, dtype)


@pytest.mark.parametrize('form', [retention_recurrent, retention_chunked_with_state])
@pytest.mark.parametrize(('tokens', 'columns'), [(5, 1), (7, 3)])
def test_gradcheck_with_state(form, tokens, columns):
    q, k, v, log_gamma = retention_inputs(2, tokens, 1, 2, 3, F64, gamma=0.6)
    state = torch.randn(2, 1, columns, 2, 3, dtype=F64, requires_grad=True)
    function = lambda q, k, v, log_gamma, state: form(  # noqa: E731
        q, k, v, log_gamma, columns, 0.3, state
    )
    assert torch.autograd.gradcheck(function, (q, k, v, log_gamma.requires_grad_(), state))


# Bad input


def test_bands_that_are_no_whole_rows_are_refused():
    q, k, v, log_gamma = retention_inputs(1, 12, 2, 3, 4)
    part = [t[:, :10] for t in (q, k, v)]
    with pytest.raises(ValueError, match=r'hw \(2, 4\) stands for 8 tokens .* got 10'):
        retention_with_state(*part, log_gamma, (2, 4))


def test_state_of_both_directions_is_refused():
    inputs = retention_inputs(1, 6, 2, 3, 4)
    with pytest.raises(ValueError, match="must be 'causal', got 'bidirectional'; a state knows"):
        retention_with_state(*inputs, direction='bidirectional')


@pytest.mark.parametrize(
    ('hw', 'state', 'error', 'message'),
    [
        (None, torch.zeros(1, 2, 3, 3), ValueError, r'\(1, 2, 3, 4\), got \(1, 2, 3, 3\)'),
        (None, torch.zeros(1, 2, 1, 3, 4), ValueError, r'\(1, 2, 3, 4\), got \(1, 2, 1, 3, 4\)'),
        ((2, 3), torch.zeros(1, 2, 3, 4), ValueError, r'\(1, 2, 3, 3, 4\), got \(1, 2, 3, 4\)'),
        ((2, 3), torch.zeros(1, 2, 2, 3, 4), ValueError, r'\(1, 2, 3, 3, 4\), got \(1, 2, 2, 3'),
        (None, torch.zeros(1, 2, 3, 4).half(), TypeError, 'torch.float32, got torch.float16; cast'),
        (None, torch.zeros(1, 2, 3, 4, device='meta'), ValueError, 'q is on cpu and state on meta'),
        (None, 0.0, TypeError, 'state must be a tensor, got float'),
    ],
)  # fmt: skip
def test_states_that_do_not_fit_are_refused(hw, state, error, message):
    with pytest.raises(error, match=message):
        retention_with_state(*retention_inputs(1, 6, 2, 3, 4), hw, state)


# Memory


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def largest(function, *args):
    with LargestTensor() as mode, torch.no_grad():
        function(*args)
    return mode.elements


@pytest.mark.parametrize('direction', ['causal', 'bidirectional'])
@pytest.mark.parametrize('hw', GRIDS)
def test_memory_is_linear_in_the_tokens(hw, direction):
    q, k, v, log_gamma = detached(retention_inputs(1, 4096, 1, 4, 4))
    rest = (columns_of(hw), direction == 'bidirectional')
    weights = 4096 * 256  # of tiles, which have at most 256 tokens
    assert largest(retention_chunked, q, k, v, log_gamma, *rest) <= weights
    assert largest(retention_backward, v, q, k, v, log_gamma, *rest) <= weights


def test_memory_of_the_definition_is_quadratic():
    assert largest(retention_parallel, *detached(retention_inputs(1, 500, 1, 4, 4))) == 500**2
