"""Retention: definition, equal forms, gradients, backends.

Sizes are B, T, H, K, V, in that order; grids are (rows, columns).
"""

import itertools
import math

import pytest
import torch

from linvis_ops import (
    retention,
    retention_with_state,
)
from linvis_ops.retention.reference import (
    retention_backward,
    retention_chunked,
    retention_chunked_with_state,
    retention_parallel,
    retention_recurrent,
)
from linvis_ops.testing import assert_matches, gradients, retention_inputs

F64 = torch.float64
NAMES = ('dq', 'dk', 'dv')
DTYPES = {'f32': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}
DIRECTIONS = ('causal', 'bidirectional')

BACKENDS = [
    pytest.param('torch', 'cpu', id='torch-cpu'),
    pytest.param('torch', 'cuda', marks=pytest.mark.gpu, id='torch-cuda'),
]

# tokens and grid: plain sequences, grids, grids with a class token
LAYOUTS = [
    (1, None), (2, None), (63, None), (65, None), (197, None),
    (1, (1, 1)), (2, (1, 1)), (12, (3, 4)), (13, (3, 4)), (71, (1, 70)), (70, (35, 2)),
    (197, (14, 14)),
]  # fmt: skip
directions = pytest.mark.parametrize('direction', DIRECTIONS)
layouts = pytest.mark.parametrize(('tokens', 'hw'), LAYOUTS)


def detached(inputs):
    return [t.detach() for t in inputs]


def four_decays(*sizes):
    """Float64 inputs whose four heads decay as in the network, not at all, fast, and at once."""
    *tokens, log_gamma = retention_inputs(*sizes[:2], 4, *sizes[2:], F64)
    log_gamma[1:] = torch.tensor([1.0, 0.5, 0.0], dtype=F64).log()
    return *tokens, log_gamma


def columns_of(hw):
    return 1 if hw is None else hw[1]


def loop(q, k, v, log_gamma, hw, bidirectional, scale):
    """The weights of the definition, pair by pair."""
    y = torch.zeros(v.shape, dtype=F64)
    batch, tokens, heads, _ = q.shape
    rows, columns = (tokens, 1) if hw is None else hw
    place = [(t // columns, t % columns) for t in range(tokens)]
    if tokens > rows * columns:
        place[-1] = (rows, columns - 1)
    for b, h, t, s in itertools.product(*map(range, (batch, heads, tokens, tokens))):
        d_row, d_column = (place[t][i] - place[s][i] for i in range(2))
        if not bidirectional and (d_row < 0 or d_column < 0):
            continue
        decay = math.exp(log_gamma[h].item()) ** (abs(d_row) + abs(d_column))
        y[b, t, h] += scale * decay * (q[b, t, h] * k[b, s, h]).sum() * v[b, s, h]
    return y


# Definition


def sequence(*numbers):
    return torch.tensor(numbers, dtype=F64).view(1, -1, 1, 1)


def log_gamma_of(gamma):
    return torch.tensor([gamma], dtype=F64).log()


@directions
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_definition_single_token_counts_once(backend, direction):
    q, k, v, log_gamma = detached(retention_inputs(2, 1, 3, 4, 5, F64))
    expected = 0.3 * (q * k).sum(-1, keepdim=True) * v
    y = retention(q, k, v, log_gamma, direction=direction, scale=0.3, backend=backend)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_definition_three_tokens_by_hand(backend):
    q, k, v = sequence(1, 2, 3), sequence(5, 7, 11), sequence(1, 10, 100)
    # k v: 5, 70, 1100
    run = lambda direction: retention(  # noqa: E731
        q, k, v, log_gamma_of(0.5), direction=direction, scale=2.0, backend=backend
    )
    causal = sequence(2 * 5, 4 * (70 + 2.5), 6 * (1100 + 35 + 1.25))
    torch.testing.assert_close(run('causal'), causal)
    both = sequence(2 * (5 + 35 + 275), 4 * (70 + 2.5 + 550), 6 * (1100 + 35 + 1.25))
    torch.testing.assert_close(run('bidirectional'), both)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_definition_grid_with_class_token_by_hand(backend):
    # k v:  1     10
    #      100   1000
    #           10000  the class token
    ones, kv = torch.ones(1, 5, 1, 1, dtype=F64), sequence(1, 10, 100, 1000, 10000)
    run = lambda direction: retention(  # noqa: E731
        ones, ones, kv, log_gamma_of(0.5), (2, 2), direction, 1.0, backend=backend
    )
    causal = sequence(1, 10.5, 100.5, 1000 + 50 + 5 + 0.25, 10000 + 500 + 25 + 2.5 + 0.125)
    torch.testing.assert_close(run('causal'), causal)
    both = sequence(
        1 + 5 + 50 + 250 + 1250,
        10 + 0.5 + 25 + 500 + 2500,
        100 + 0.5 + 2.5 + 500 + 2500,
        1000 + 0.25 + 5 + 50 + 5000,
        10000 + 0.125 + 2.5 + 25 + 500,
    )
    torch.testing.assert_close(run('bidirectional'), both)


@directions
@pytest.mark.parametrize(
    ('tokens', 'hw'), [(5, None), (6, (2, 3)), (7, (2, 3)), (4, (1, 3)), (4, (3, 1))]
)
def test_definition_equals_loop(tokens, hw, direction):
    inputs = detached(retention_inputs(2, tokens, 2, 3, 2, F64, gamma=0.7))
    expected = loop(*inputs, hw, direction == 'bidirectional', 0.7)
    y = retention(*inputs, hw, direction, 0.7, backend='reference')
    torch.testing.assert_close(y, expected)


def test_scale_defaults_to_the_root_of_the_key_width():
    inputs = retention_inputs(1, 5, 2, 9, 4)
    for backend in ('torch', 'reference'):
        expected = retention(*inputs, scale=1 / 3, backend=backend)
        torch.testing.assert_close(retention(*inputs, backend=backend), expected)
    o, _ = retention_with_state(*inputs)
    torch.testing.assert_close(o, retention(*inputs, scale=1 / 3))


# Properties


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_nothing_leaks_from_the_future(backend, device):
    q, k, v, log_gamma = detached(retention_inputs(1, 41, 1, 3, 4, device=device))
    for hw, changed in ((None, 20), ((5, 8), 19), ((5, 8), 40)):
        y = retention(q, k, v, log_gamma, hw, backend=backend)
        other_k, other_v = k.clone(), v.clone()
        other_k[:, changed] += 1e3
        other_v[:, changed] -= 1e3
        other = retention(q, other_k, other_v, log_gamma, hw, backend=backend)
        differs = (y != other).any(-1).flatten().cpu()
        position = torch.arange(41)
        expected = position >= changed
        if hw is not None:
            row, column = position // 8, position % 8
            column[40] = 7
            expected = (row >= row[changed]) & (column >= column[changed])
        assert torch.equal(differs, expected)


@directions
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_exchanged_rows_and_columns_exchange_the_output(backend, device, direction):
    inputs = retention_inputs(2, 45, 2, 5, 6, device=device)
    y = retention(*inputs, (5, 9), direction, backend=backend)
    turn = lambda x, hw: x.unflatten(1, hw).transpose(1, 2).flatten(1, 2)  # noqa: E731
    turned = retention(
        *(turn(t, (5, 9)) for t in inputs[:3]), inputs[3], (9, 5), direction, backend=backend
    )
    torch.testing.assert_close(turn(turned, (9, 5)), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('hw', [None, (7, 11)])
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_reversed_tokens_reverse_the_bidirectional_output(backend, device, hw):
    q, k, v, log_gamma = retention_inputs(2, 77, 2, 5, 6, device=device)
    y = retention(q, k, v, log_gamma, hw, 'bidirectional', backend=backend)
    flipped = (t.flip(1) for t in (q, k, v))
    other = retention(*flipped, log_gamma, hw, 'bidirectional', backend=backend)
    torch.testing.assert_close(other.flip(1), y, rtol=1e-4, atol=1e-5)


@directions
@pytest.mark.parametrize('hw', [(1, 50), (50, 1)])
def test_a_grid_of_one_row_or_column_is_a_sequence(hw, direction):
    inputs = detached(retention_inputs(2, 50, 2, 3, 4, F64))
    expected = retention(*inputs, direction=direction)
    torch.testing.assert_close(retention(*inputs, hw, direction), expected)


@directions
@layouts
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_no_decay_gives_linear_attention_and_no_memory_the_token_itself(
    backend, device, tokens, hw, direction
):
    q, k, v, log_gamma = retention_inputs(2, tokens, 2, 4, 6, device=device, gamma=0.0)
    assert log_gamma.eq(-math.inf).all()
    y = retention(q, k, v, log_gamma, hw, direction, 1.0, backend=backend)
    torch.testing.assert_close(y, (q * k).sum(-1, keepdim=True) * v, rtol=1e-4, atol=1e-5)
    if hw is None or direction == 'bidirectional':
        y = retention(q, k, v, torch.zeros_like(log_gamma), hw, direction, 1.0, backend=backend)
        weight = torch.einsum('bthk,bshk->bhts', q, k)
        weight = weight.tril() if direction == 'causal' else weight
        expected = torch.einsum('bhts,bshv->bthv', weight, v)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('hw', [None, (3, 6)])
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_heads_and_pictures_do_not_mix(backend, device, hw):
    q, k, v, log_gamma = retention_inputs(3, 18, 4, 5, 6, device=device)
    y = retention(q, k, v, log_gamma, hw, backend=backend)
    some = [t[1:2, :, 2:3] for t in (q, k, v)]
    torch.testing.assert_close(
        retention(*some, log_gamma[2:3], hw, backend=backend), y[1:2, :, 2:3]
    )


# Equal forms

TILES = [None, (1, 1), (2, 3), (3, 2), (5, 40), (64, 20)]


@directions
@pytest.mark.parametrize('tile', TILES)
@layouts
def test_chunked_equals_parallel(tokens, hw, tile, direction):
    inputs = detached(four_decays(2, tokens, 3, 5))
    rest = (columns_of(hw), direction == 'bidirectional')
    torch.testing.assert_close(
        retention_chunked(*inputs, *rest, tile=tile),
        retention_parallel(*inputs, *rest),
        rtol=1e-10,
        atol=1e-11,
    )


@layouts
def test_recurrent_equals_parallel(tokens, hw):
    inputs = detached(four_decays(2, tokens, 3, 5))
    o, _ = retention_recurrent(*inputs, columns_of(hw))
    expected = retention_parallel(*inputs, columns_of(hw))
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-11)


def test_a_softmax_in_the_parallel_form_alone_would_break_the_duality():
    # softmax(scale q k^T * D) v, as the authors' code has it: README.md, Differences
    q, k, v, log_gamma = detached(retention_inputs(1, 65, 3, 16, 16))
    recurrent, _ = retention_recurrent(q, k, v, log_gamma)
    steps = torch.arange(65)[:, None] - torch.arange(65)
    decay = (log_gamma[:, None, None] * steps).exp().tril()
    scores = torch.einsum('bthk,bshk->bhts', q, k) * q.shape[3] ** -0.5
    softmax = torch.einsum('bhts,bshv->bthv', (scores * decay).softmax(-1), v)
    assert (softmax - recurrent).abs().max() > 1.0
    ours = retention_parallel(q, k, v, log_gamma)
    torch.testing.assert_close(ours, recurrent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('tokens', 'hw'), [(1000, None), (1601, (40, 40)), (2000, (20, 100))])
def test_chunked_equals_recurrent_on_long_sequences(tokens, hw):
    inputs = detached(retention_inputs(1, tokens, 2, 4, 4, F64))
    expected, state = retention_recurrent(*inputs, columns_of(hw))
    o = retention_chunked(*inputs, columns_of(hw))
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-11)
    o, left = retention_chunked_with_state(*inputs, columns_of(hw))
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(left, state, rtol=1e-10, atol=1e-11)


# Gradients


@directions
@pytest.mark.parametrize(('tokens', 'hw'), [(6, None), (6, (2, 3)), (7, (2, 3))])
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_gradcheck(backend, tokens, hw, direction):
    q, k, v, log_gamma = retention_inputs(2, tokens, 1, 2, 3, F64, gamma=0.6)
    if backend == 'reference':
        log_gamma.requires_grad_()
    function = lambda *args: retention(*args, hw, direction, 0.3, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v, log_gamma))


@directions
@pytest.mark.parametrize('tile', [None, (1, 1), (2, 3)])
@layouts
def test_hand_written_backward_equals_autograd(tokens, hw, tile, direction):
    inputs = four_decays(2, tokens, 3, 5)
    rest = (columns_of(hw), direction == 'bidirectional', 0.3)
    y = retention_parallel(*inputs, *rest)
    go = torch.randn_like(y)
    actual = retention_backward(go, *detached(inputs), *rest, tile=tile)
    for name, a, e in zip(NAMES, actual, gradients(y, inputs[:3], go), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f'{n}: {m}')


def test_reference_backend_has_second_derivatives():
    q, k, v, log_gamma = retention_inputs(1, 5, 2, 2, 2, F64, gamma=0.6)
    function = lambda *args: retention(*args, (2, 2), backend='reference')  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (q, k, v, log_gamma.requires_grad_()))


def test_gradient_by_the_decay_is_refused_where_it_is_not_computed():
    q, k, v, log_gamma = retention_inputs(1, 5, 2, 2, 2)
    log_gamma.requires_grad_()
    with pytest.raises(ValueError, match="requires a gradient, which only backend='reference'"):
        retention(q, k, v, log_gamma)
    with torch.no_grad():
        retention(q, k, v, log_gamma)


# Backends against float64


def check_against_float64(backend, device, inputs, hw, direction, judge='reference'):
    dtype = inputs[0].dtype
    *tokens, log_gamma = inputs
    exact = [t.detach().cpu().double().requires_grad_() for t in tokens]
    short = [t.detach().requires_grad_() for t in tokens]
    go = torch.randn(inputs[2].shape, dtype=F64).to(dtype)
    y64 = retention(*exact, log_gamma.cpu().double(), hw, direction, backend=judge)
    plain = retention(*short, log_gamma, hw, direction, backend=judge)
    y = retention(*inputs, hw, direction, backend=backend)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_matches('y', y.cpu(), y64, plain.cpu(), dtype)
    g64 = gradients(y64, exact, go.double())
    g_plain = gradients(plain, short, go.to(device))
    g = gradients(y, tokens, go.to(device))
    for name, a, p, e in zip(NAMES, g, g_plain, g64, strict=True):
        assert a.dtype == dtype
        assert a.is_contiguous()
        assert_matches(name, a.cpu(), e, p.cpu(), dtype)


@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
@directions
@layouts
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_matches_float64(backend, device, tokens, hw, direction, dtype):
    inputs = retention_inputs(1, tokens, 2, 16, 32, dtype, device)
    check_against_float64(backend, device, inputs, hw, direction)


WIDTHS = [(64, 64), (16, 64), (5, 7), (1, 1), (48, 100), (100, 3)]


@directions
@pytest.mark.parametrize(('key_width', 'value_width'), WIDTHS)
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_matches_float64_at_other_widths(
    backend, device, key_width, value_width, direction
):
    inputs = retention_inputs(2, 41, 3, key_width, value_width, device=device)
    for hw in (None, (5, 8)):
        check_against_float64(backend, device, inputs, hw, direction)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize('gamma', [1.0, 1 - 1e-6, 0.999, 0.5, 1e-30, 0.0])
@pytest.mark.parametrize('values', ['random', 'equal', 'large'])
@directions
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_extreme_inputs_are_finite_and_right(backend, device, direction, values, gamma, dtype):
    inputs = retention_inputs(1, 145, 2, 8, 8, dtype, device, gamma=gamma)
    with torch.no_grad():
        for tensor in inputs[:3]:
            if values == 'equal':
                tensor.fill_(0.5)
            elif values == 'large':
                tensor *= 80
    for hw in (None, (12, 12)):
        check_against_float64(backend, device, inputs, hw, direction)


@pytest.mark.parametrize('hw', [None, (64, 64), (2, 2048)])
@directions
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_long_sequences_match_float64(backend, device, direction, hw):
    # chunked in float64: equal to the definition by the tests above
    inputs = retention_inputs(1, 4096, 3, 4, 8, device=device)
    check_against_float64(backend, device, inputs, hw, direction, judge='torch')


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_plain_pytorch_rounds_short_dtypes_once(backend):
    *short, log_gamma = retention_inputs(2, 40, 2, 16, 32, torch.bfloat16)
    long = [t.detach().float().requires_grad_() for t in short]
    y, y_long = (retention(*each, log_gamma, (5, 8), backend=backend) for each in (short, long))
    assert torch.equal(y, y_long.bfloat16())
    go = torch.randn_like(y)
    g, g_long = gradients(y, short, go), gradients(y_long, long, go)
    for name, a, e in zip(NAMES, g, g_long, strict=True):
        assert torch.equal(a, e.bfloat16()), name


@directions
@pytest.mark.parametrize('hw', [None, (4, 4)])
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_non_contiguous_inputs(backend, device, hw, direction):
    q, k, v, log_gamma = detached(retention_inputs(2, 17, 3, 6, 10, device=device))
    # heads before tokens in memory; one key for all channels; every other value
    views = [q.transpose(1, 2).contiguous().transpose(1, 2), k[..., :1].expand(-1, -1, -1, 6)]
    views = [t.requires_grad_() for t in (*views, v[..., ::2])]
    dense = [t.detach().contiguous().requires_grad_() for t in views]
    y = retention(*views, log_gamma, hw, direction, backend=backend)
    expected = retention(*dense, log_gamma, hw, direction, backend='reference')
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    go = torch.randn(2, 3, 17, 5, device=device).transpose(1, 2)
    for a, e in zip(gradients(y, views, go), gradients(expected, dense, go), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@directions
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_repeated_runs_are_bit_identical(backend, device, direction):
    inputs = retention_inputs(3, 35, 2, 6, 10, device=device)
    runs = []
    for _ in range(2):
        y = retention(*inputs, (5, 7), direction, backend=backend)
        runs.append((y, *gradients(y, inputs[:3], torch.ones_like(y))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
