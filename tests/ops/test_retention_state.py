"""Retention of sequences that come in pieces, and the memory that retention takes.

Sizes are B, T, H, K, V, in that order; grids are (rows, columns).
"""

import itertools
import math

import pytest
import torch
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from linvis_ops import BackendUnavailableError, retention, retention_with_state
from linvis_ops._triton import interpreting
from linvis_ops.retention.reference import (
    retention_backward,
    retention_chunked,
    retention_chunked_with_state,
    retention_parallel,
    retention_recurrent,
)
from linvis_ops.testing import assert_matches, gradients, relative_rms, retention_inputs

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


def streamed(inputs, hw, pieces, **options):
    """Output of all pieces together, and the state behind the last."""
    *tokens, log_gamma = inputs
    state, outputs = None, []
    for piece, band in pieces:
        given = (t[:, piece] for t in tokens)
        o, state = retention_with_state(*given, log_gamma, band, state, **options)
        outputs.append(o)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize('backend', ['torch', 'reference'])
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
    ('tokens', 'hw', 'class_alone'),
    [
        (2, None, False), (300, None, False), (60, (12, 5), False), (61, (12, 5), False),
        (61, (12, 5), True), (400, (8, 50), False), (401, (8, 50), True), (9, (9, 1), False),
    ],
)  # fmt: skip
def test_pieces_equal_the_whole(tokens, hw, class_alone, seed, backend):
    inputs = retention_inputs(2, tokens, 2, 3, 4, F64)
    expected = retention(*inputs, hw, backend='reference')
    pieces = in_pieces(tokens, hw, class_alone, seed)
    y, state = streamed(inputs, hw, pieces, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    columns = () if hw is None else (hw[1],)
    assert state.shape == (2, 2, *columns, 3, 4)
    _, left = retention_recurrent(*detached(inputs), columns_of(hw))
    torch.testing.assert_close(state, left[:, :, 0] if hw is None else left)
    go = torch.randn_like(expected)
    for a, e in zip(gradients(y, inputs[:3], go), gradients(expected, inputs[:3], go), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


# No decay, hardly any memory, none; wide grids, whose columns are summed in blocks
EXTREME = [0.0, -20.0, -math.inf]


@pytest.mark.parametrize('dtype', [torch.float32, F64], ids=['f32', 'f64'])
@pytest.mark.parametrize('log_decay', [-0.01, *EXTREME])
@pytest.mark.parametrize('hw', [None, (3, 128), (3, 129), (3, 257), (2, 300), (300, 2)], ids=str)
def test_extreme_decays_and_wide_grids(hw, log_decay, dtype):
    tokens = 300 if hw is None else hw[0] * hw[1] + 1
    *exact, _ = detached(retention_inputs(1, tokens, 1, 3, 2, F64))
    log_gamma = torch.tensor([log_decay], dtype=F64)
    expected = retention(*exact, log_gamma, hw, backend='reference')
    inputs = (t.to(dtype) for t in (*exact, log_gamma))
    y, state = streamed(inputs, hw, in_pieces(tokens, hw, True, 0))
    assert_matches('y', y, expected, None, dtype)
    _, left = retention_recurrent(*exact, log_gamma, columns_of(hw))
    assert_matches('state', state, left[:, :, 0] if hw is None else left, None, dtype)


@pytest.mark.parametrize('hw', [None, (1000, 3)])
def test_state_carried_over_a_thousand_pieces(hw):
    columns = columns_of(hw)
    inputs = detached(retention_inputs(1, 1000 * columns, 2, 4, 3, gamma=0.9999))
    exact = [t.double() for t in inputs]
    expected = retention_chunked(*exact, columns)
    band = None if hw is None else (1, columns)
    pieces = [(slice(i * columns, (i + 1) * columns), band) for i in range(1000)]
    y, state = streamed(inputs, hw, pieces)
    # gamma is rounded once a piece, in the recurrence too
    plain, s_plain = streamed(inputs, hw, pieces, backend='reference')
    assert_matches('y', y, expected, plain, torch.float32)
    _, left = retention_chunked_with_state(*exact, columns)
    left = left[:, :, 0] if hw is None else left
    assert_matches('state', state, left, s_plain, torch.float32)
    assert relative_rms(state, left) < 1e-4


@pytest.mark.parametrize('backend', ['auto', 'torch', 'triton', 'reference'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, F64], ids=['bf16', 'f64'])
@pytest.mark.parametrize('hw', [None, (0, 3), (0, 1)])
def test_empty_piece_leaves_the_state_as_it_was(hw, dtype, backend):
    *tokens, log_gamma = retention_inputs(2, 4, 2, 3, 5, dtype)
    tokens = [t[:, :0].detach().requires_grad_() for t in tokens]
    shape = (2, 2, *(() if hw is None else (hw[1],)), 3, 5)
    wide = F64 if dtype == F64 else torch.float32
    for state in (None, torch.randn(shape, dtype=wide, requires_grad=True)):
        o, left = retention_with_state(*tokens, log_gamma, hw, state, backend=backend)
        assert o.shape == (2, 0, 2, 5)
        assert o.dtype == dtype
        assert left.dtype == wide
        assert torch.equal(left, torch.zeros(shape, dtype=wide) if state is None else state)
        assert left is not state
        weight = torch.randn(shape, dtype=wide)
        (o.sum() + (left * weight).sum()).backward()
        assert all(t.grad is not None for t in tokens)
        assert state is None or torch.equal(state.grad, weight)


@pytest.mark.parametrize('hw', [None, (2, 3)])
def test_empty_pieces_between_others_change_nothing(hw):
    inputs = retention_inputs(1, 12, 2, 3, 4, F64)
    none = None if hw is None else (0, 3)
    pieces = [(slice(0, 6), hw), (slice(6, 12), hw)]
    expected = streamed(inputs, hw, pieces)
    empty = (slice(0, 0), none)
    y, state = streamed(inputs, hw, [empty, pieces[0], empty, pieces[1], empty])
    torch.testing.assert_close((y, state), expected)


def test_strided_inputs_and_states():
    q, k, v, log_gamma = detached(retention_inputs(2, 26, 3, 4, 5))
    strided = [t.mT.contiguous().mT for t in (q, k, v)]
    state = torch.randn(2, 3, 5, 4, 5)
    for hw, given in (((5, 5), state), (None, state[:, :, 0])):
        expected = retention_with_state(q, k, v, log_gamma, hw, given)
        other = retention_with_state(*strided, log_gamma, hw, given.mT.contiguous().mT)
        torch.testing.assert_close(other, expected)


def test_inputs_and_state_are_not_changed():
    inputs = detached(retention_inputs(1, 13, 2, 3, 4))
    state = torch.randn(1, 2, 4, 3, 4)
    before = [t.clone() for t in (*inputs, state)]
    retention_with_state(*inputs, (3, 4), state)
    for a, e in zip((*inputs, state), before, strict=True):
        assert torch.equal(a, e)


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


@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize(
    ('tokens', 'hw'), [(5, None), (6, (2, 3)), (7, (2, 3)), (1, (0, 3)), (4, (4, 1))]
)
def test_gradcheck_of_pieces(tokens, hw, given):
    q, k, v, log_gamma = retention_inputs(2, tokens, 2, 2, 3, F64, gamma=0.6)
    shape = (2, 2, *(() if hw is None else (hw[1],)), 2, 3)
    state = torch.randn(shape, dtype=F64, requires_grad=True)
    function = lambda q, k, v, state: retention_with_state(  # noqa: E731
        q, k, v, log_gamma, hw, state if given else None, scale=0.3, backend='torch'
    )
    assert torch.autograd.gradcheck(function, (q, k, v, state))


@pytest.mark.parametrize('hw', [None, (2, 3)])
def test_gradient_by_the_decays(hw):
    q, k, v, log_gamma = retention_inputs(1, 6, 2, 2, 3, F64, gamma=0.6)
    state = torch.randn(1, 2, *(() if hw is None else (3,)), 2, 3, dtype=F64, requires_grad=True)
    log_gamma.requires_grad_()
    function = lambda *inputs: retention_with_state(*inputs[:4], hw, inputs[4])  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v, log_gamma, state))
    with pytest.raises(ValueError, match=r'^retention_with_state: log_gamma requires'):
        retention_with_state(q, k, v, log_gamma, hw, state, backend='torch')
    with torch.no_grad():
        retention_with_state(q, k, v, log_gamma, hw, state, backend='torch')


# Backends

devices = pytest.mark.parametrize(
    'device',
    [
        pytest.param(
            'cpu',
            marks=pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1'),
            id='interpreter',
        ),
        pytest.param('cuda', marks=pytest.mark.gpu),
    ],
)


def check_backend_against_float64(backend, device, dtype, sizes, hw, bands):
    """Bands of so many rows (tokens of a plain sequence), then the class token if there is one."""
    columns = columns_of(hw)
    inputs = retention_inputs(*sizes, dtype, device)
    ends = [0, *itertools.accumulate(bands)]
    pieces = [
        (slice(a * columns, b * columns), None if hw is None else (b - a, columns))
        for a, b in itertools.pairwise(ends)
    ]
    if sizes[1] > ends[-1] * columns:
        pieces.append((slice(ends[-1] * columns, None), (0, columns)))
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs[:3]]
    plain_inputs = [t.detach().requires_grad_() for t in inputs[:3]]
    log_gamma = inputs[3].cpu().double()
    y64, s64 = streamed((*exact, log_gamma), hw, pieces, backend='reference')
    torch.testing.assert_close(y64, retention(*exact, log_gamma, hw, backend='torch'))
    plain, s_plain = streamed((*plain_inputs, inputs[3]), hw, pieces, backend='reference')
    y, state = streamed(inputs, hw, pieces, backend=backend)
    assert y.dtype == dtype
    assert_matches('y', y.cpu(), y64, plain.cpu(), dtype)
    assert_matches('state', state.cpu(), s64, s_plain.cpu(), dtype)
    go, gs = torch.randn(y.shape, dtype=F64).to(dtype), torch.randn(state.shape)
    grads = [
        torch.autograd.grad((o, s), given, (go.to(o), gs.to(s)))
        for o, s, given in (
            (y, state, inputs[:3]), (plain, s_plain, plain_inputs), (y64, s64, exact)
        )
    ]  # fmt: skip
    for name, a, p, e in zip(('dq', 'dk', 'dv'), *grads, strict=True):
        assert_matches(name, a.cpu(), e, p.cpu(), dtype)


@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ('tokens', 'hw', 'bands'),
    [(90, None, (40, 1, 49)), (91, (10, 9), (3, 1, 6)), (12, (4, 3), (1, 3))],
)
def test_pytorch_backend_is_right_in_every_dtype(tokens, hw, bands, dtype):
    check_backend_against_float64('torch', 'cpu', dtype, (2, tokens, 2, 8, 8), hw, bands)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize(
    ('tokens', 'hw', 'bands'), [(20, None, (17, 1, 2)), (26, (5, 5), (1, 4)), (6, (3, 2), (3,))]
)
@devices
def test_triton_kernels_beside_a_state(device, tokens, hw, bands, dtype):
    check_backend_against_float64('triton', device, dtype, (1, tokens, 2, 16, 16), hw, bands)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ('tokens', 'hw', 'bands'),
    [
        (4096, None, (1024, 1024, 2047, 1)),
        (4097, (64, 64), (16, 16, 1, 31)),
        (1025, (8, 128), (4, 4)),
        (1201, (4, 300), (1, 3)),
    ],
    ids=str,
)
def test_triton_kernels_beside_a_state_at_sizes_of_the_network(tokens, hw, bands, dtype):
    check_backend_against_float64('triton', 'cuda', dtype, (2, tokens, 6, 64, 64), hw, bands)


def test_backend_is_that_of_retention(monkeypatch):
    inputs = retention_inputs(1, 6, 2, 3, 4)
    with pytest.raises(BackendUnavailableError, match=r"no backend 'tritn'; choose one of auto, "):
        retention_with_state(*inputs, backend='tritn')
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'tritn')
    with pytest.raises(BackendUnavailableError, match=r'^LINVIS_OPS_BACKEND=tritn'):
        retention_with_state(*inputs)
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'reference')
    function = retention_with_state.__globals__
    monkeypatch.setitem(function, 'add_state', None)  # not called
    retention_with_state(*inputs)


@pytest.mark.parametrize('grid', [False, True])
def test_compiles_without_graph_breaks_and_without_recompiling_for_a_new_size(grid):
    def layer(q, k, v, log_gamma, rows, columns, state):
        hw = (rows, columns) if grid else None
        o, state = retention_with_state(q, k, v, log_gamma, hw, state)
        return o * 2, state

    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, dynamic=True, backend='aot_eager')
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, rows, columns in ((2, 3, 4), (3, 5, 6)):
            inputs = retention_inputs(batch, rows * columns, 6, 5, 7)
            state = torch.randn(batch, 6, *((columns,) if grid else ()), 5, 7, requires_grad=True)
            y, left = function(*inputs, rows, columns, state)
            torch.testing.assert_close((y, left), layer(*inputs, rows, columns, state))
            (y.sum() + left.sum()).backward()
            assert all(t.grad is not None for t in (*inputs[:3], state))


@pytest.mark.parametrize(('hw', 'sums'), [(None, 0), ((5, 4), 4)])
def test_flops_are_counted(hw, sums):
    inputs = detached(retention_inputs(2, 20, 3, 4, 5))
    state = torch.zeros(2, 3, *(() if hw is None else (4,)), 4, 5)
    with FlopCounterMode(display=False) as counter:
        retention(*inputs, hw)
        piece = counter.get_total_flops()
        retention_with_state(*inputs, hw, state)
    elements = 2 * 3 * 4 * 5  # of a state of one column
    # read 2 and added 2 for each token; each column's sum over all columns
    beside = elements * (4 * 20 + 2 * sums**2)
    assert counter.get_total_flops() == 2 * piece + beside


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


@pytest.mark.parametrize('hw', [None, (64, 64), (1, 4096), (4096, 1), (4, 1024)])
def test_memory_of_a_piece_is_that_of_its_tokens_and_of_states(hw):
    q, k, v, log_gamma = detached(retention_inputs(1, 4096, 1, 16, 16))
    columns = columns_of(hw)
    state = torch.randn(1, 1, *(() if hw is None else (columns,)), 16, 16)
    # beside the states: decays between the columns of a block, for each token at most 128
    most = max(4096 * 128, columns * 16 * 16)
    assert largest(retention_with_state, q, k, v, log_gamma, hw, state) <= most


class Launches(TorchDispatchMode):
    """Counts operators that compute: views and memory that is not written are none."""

    FREE = frozenset(('_reshape_alias', '_unsafe_view', 'empty', 'lift_fresh', 'retention_fwd'))

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split('.')[0]
        if not function.is_view and name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize(('hw', 'most'), [(None, 12), ((2, 600), 26), ((100, 12), 15)])
def test_few_launches_beside_the_operator_whatever_the_size(hw, most, dtype):
    *_, log_gamma = detached(retention_inputs(1, 1, 6, 1, 1))
    x = torch.randn(1, 1200, 3 * 6 * 8).to(dtype)
    q, k, v = (part.unflatten(2, (6, 8)) for part in x.chunk(3, dim=2))
    state = torch.randn(1, 6, *(() if hw is None else hw[1:]), 8, 8)
    with Launches() as launches, torch.no_grad():
        retention_with_state(q, k, v, log_gamma, hw, state)
    assert len(launches.names) <= most, launches.names


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
