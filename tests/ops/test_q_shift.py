"""Q-Shift: definition, adjoint, backends, registration, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from linvis_ops import BackendUnavailableError, q_shift
from linvis_ops._triton import interpreting
from linvis_ops.q_shift.op import q_shift as q_shift_op

F64 = torch.float64
CASES = [((1, 1), 4), ((3, 4), 8), ((5, 1), 12), ((1, 6), 7), ((2, 3), 3), ((14, 14), 20)]
BACKENDS = [
    pytest.param('torch', 'cpu', id='torch-cpu'),
    pytest.param(
        'triton',
        'cpu',
        marks=pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1'),
        id='triton-interpreter',
    ),
    pytest.param('triton', 'cuda', marks=pytest.mark.gpu, id='triton-cuda'),
]


def loop(x, hw):
    """Token by token, channel by channel."""
    rows, columns = hw
    y = x.clone()
    quarter = x.shape[2] // 4
    neighbours = [(0, -1), (0, 1), (-1, 0), (1, 0)]  # left, right, top, bottom
    for t in range(rows * columns):
        row, column = divmod(t, columns)
        for c in range(4 * quarter):
            d_row, d_column = neighbours[c // quarter]
            r, s = row + d_row, column + d_column
            inside = 0 <= r < rows and 0 <= s < columns
            y[:, t, c] = x[:, r * columns + s, c] if inside else 0
    return y


def tokens(hw, channels, class_token, **kwargs):
    return torch.randn(2, hw[0] * hw[1] + class_token, channels, **kwargs)


# Definition


def test_definition_by_hand():
    # one row of three tokens: the first two quarters come from the left and from the right, the
    # others from outside
    x = torch.arange(1.0, 13.0).view(1, 3, 4)
    expected = torch.tensor([[0.0, 6, 0, 0], [1, 10, 0, 0], [5, 0, 0, 0]])[None]
    assert torch.equal(q_shift(x, (1, 3), backend='reference'), expected)


@pytest.mark.parametrize('class_token', [0, 1])
@pytest.mark.parametrize(('hw', 'channels'), CASES)
def test_definition_equals_loop(hw, channels, class_token):
    x = tokens(hw, channels, class_token)
    assert torch.equal(q_shift(x, hw, backend='reference'), loop(x, hw))


# Backends


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('class_token', [0, 1])
@pytest.mark.parametrize(('hw', 'channels'), CASES)
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_and_its_gradient_equal_the_definition(
    backend, device, hw, channels, class_token, dtype
):
    x = tokens(hw, channels, class_token, dtype=dtype, device=device).requires_grad_()
    gy = torch.randn_like(x)
    y = q_shift(x, hw, backend=backend)
    expected = q_shift(x, hw, backend='reference')
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y, x, gy)
    (expected_gradient,) = torch.autograd.grad(expected, x, gy)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


@pytest.mark.parametrize('class_token', [0, 1])
@pytest.mark.parametrize(('channels', 'heads'), [(24, 3), (18, 2), (9, 3), (128, 2)])
@pytest.mark.parametrize(('backend', 'device'), [*BACKENDS, ('reference', 'cpu')])
def test_heads_are_shifted_each_by_itself(backend, device, channels, heads, class_token):
    x = tokens((3, 4), channels, class_token, device=device).requires_grad_()
    y = q_shift(x, (3, 4), heads=heads, backend=backend)
    parts = [q_shift(part, (3, 4), backend='reference') for part in x.chunk(heads, 2)]
    expected = torch.cat(parts, 2)
    assert torch.equal(y, expected)
    g = torch.randn_like(x)
    (gradient,), (expected,) = (torch.autograd.grad(z, x, g) for z in (y, expected))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_float64_is_moved_as_it_is(device):
    # by the plain backend on a GPU too, where the kernel does not take float64
    x = tokens((5, 7), 13, 1, dtype=F64, device=device).requires_grad_()
    y = q_shift(x, (5, 7))
    assert torch.equal(y.detach(), loop(x.detach(), (5, 7)))
    g = torch.randn_like(x)
    expected = torch.autograd.grad(q_shift(x, (5, 7), backend='reference'), x, g)
    assert torch.equal(*torch.autograd.grad(y, x, g), *expected)


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_non_contiguous_input(backend, device):
    x = torch.randn(2, 8, 12, device=device).transpose(1, 2)
    y = q_shift(x, (3, 4), backend=backend)
    torch.testing.assert_close(y, q_shift(x.contiguous(), (3, 4), backend='reference'))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    channels=st.integers(1, 17),
    class_token=st.integers(0, 1),
)
def test_plain_backend_equals_the_loop_and_its_gradient_is_the_adjoint(
    rows, columns, channels, class_token
):
    x = tokens((rows, columns), channels, class_token, dtype=F64).requires_grad_()
    y = q_shift(x, (rows, columns), backend='torch')
    assert torch.equal(y, loop(x.detach(), (rows, columns)))
    # the shift is linear: <g, S x> = <S^T g, x>
    g = torch.randn_like(y)
    (adjoint,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((g * y).sum(), (adjoint * x).sum())


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_repeated_runs_are_bit_identical(backend, device):
    x = tokens((7, 9), 37, 1, device=device).requires_grad_()
    g = torch.randn_like(x)
    runs = []
    for _ in range(2):
        y = q_shift(x, (7, 9), backend=backend)
        runs.append((y, *torch.autograd.grad(y, x, g)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


# Registration


def test_gradcheck_and_second_derivative():
    x = tokens((3, 2), 5, 1, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: q_shift(t, (3, 2)), (x,))
    assert torch.autograd.gradgradcheck(lambda t: q_shift(t, (3, 2)), (x,))
    x = tokens((3, 2), 10, 0, dtype=F64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: q_shift(t, (3, 2), heads=2), (x,))


@pytest.mark.parametrize('adjoint', [False, True])
@pytest.mark.parametrize(
    ('backend', 'device'),
    [('torch', 'cpu'), pytest.param('triton', 'cuda', marks=pytest.mark.gpu)],
)
def test_opcheck(backend, device, adjoint):
    x = torch.randn(2, 8, 12, device=device).transpose(1, 2).requires_grad_()
    torch.library.opcheck(q_shift_op.definition, (x, 3, 4, 2, adjoint, backend))


def test_compiles_without_graph_breaks_and_without_recompiling_for_a_new_size():
    function = torch.compile(
        lambda x, rows, columns: q_shift(x, (rows, columns)) * 2,
        fullgraph=True,
        dynamic=True,
        backend='aot_eager',
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, rows, columns in ((2, 3, 4), (3, 5, 6), (4, 7, 2)):
            x = torch.randn(batch, rows * columns, 8, requires_grad=True)
            y = function(x, rows, columns)
            torch.testing.assert_close(y, 2 * q_shift(x, (rows, columns)))
            y.sum().backward()


@pytest.mark.parametrize('class_token', [0, 1])
def test_exports_with_a_dynamic_grid(class_token):
    class Layer(torch.nn.Module):
        def forward(self, grid):
            x = torch.cat([grid.flatten(1, 2), grid[:, 0, :class_token]], 1)
            return q_shift(x, tuple(grid.shape[1:3]))

    sizes = {n: torch.export.Dim(name, min=2, max=64) for n, name in ((1, 'rows'), (2, 'columns'))}
    program = torch.export.export(Layer(), (torch.randn(2, 3, 4, 8),), dynamic_shapes=(sizes,))
    other = torch.randn(2, 5, 6, 8)
    assert torch.equal(program.module()(other), Layer()(other))


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_autocast_does_not_touch_the_tokens(backend):
    x = tokens((3, 4), 8, 1)
    expected = q_shift(x, (3, 4), backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = q_shift(x, (3, 4), backend=backend)
    assert torch.equal(y, expected)


def test_no_operations_are_counted_for_moving_data():
    x = tokens((3, 4), 8, 0).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        q_shift(x, (3, 4)).sum().backward()
    # an entry: the operator has a formula, and is not merely unknown to the counter
    assert counter.get_flop_counts()['Global'] == {torch.ops.linvis.q_shift: 0}


# Bad input


@pytest.mark.parametrize(
    ('x', 'hw', 'error', 'message'),
    [
        (torch.zeros(2, 12), (3, 4), ValueError, r'x must be \(B, T, C\), got \(2, 12\)'),
        (torch.zeros(2, 14, 4), (3, 4), ValueError, r'stands for 12 tokens \(13 with .*got 14'),
        (torch.zeros(2, 12, 4), (0, 4), ValueError, r'hw must be \(rows, columns\)'),
        (torch.zeros(2, 12, 4).long(), (3, 4), TypeError, r'got torch.int64'),
        ([1.0], (3, 4), TypeError, r'x must be a tensor, got list'),
        (torch.zeros(2, 12, 4), (3, 4, 1), ValueError, r'hw must be .*, got \(3, 4, 1\)'),
        (torch.zeros(2, 4, 4), 4, TypeError, r'hw must be \(rows, columns\) of type int, got 4\.'),
        (torch.zeros(2, 4, 4), (2.0, 2.0), TypeError, r'of type int, got \(2\.0, 2\.0\)'),
        (torch.zeros(2, 4, 4), ('2', '2'), TypeError, r"of type int, got \('2', '2'\)"),
        (torch.zeros(2, 4, 4), None, TypeError, r'of type int, got None'),
    ],
)
def test_bad_input_is_refused_in_one_sentence(x, hw, error, message):
    with pytest.raises(error, match=message) as caught:
        q_shift(x, hw)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('heads', 'error', 'message'),
    [
        (3, ValueError, r'heads must divide the 8 channels, got 3'),
        (0, ValueError, r'heads must divide the 8 channels, got 0'),
        ('2', TypeError, r"heads must be an int, got '2'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(heads, error, message):
    with pytest.raises(error, match=message):
        q_shift(torch.zeros(2, 12, 8), (3, 4), heads=heads)


def test_unknown_backend_is_refused():
    with pytest.raises(
        BackendUnavailableError,
        match="no backend 'tritn'; choose one of auto, triton, torch, reference",
    ):
        q_shift(tokens((1, 2), 4, 0), (1, 2), backend='tritn')


@pytest.mark.skipif(torch.cuda.is_available() or interpreting(), reason='Triton can run here')
def test_unavailable_backend_says_why():
    with pytest.raises(
        BackendUnavailableError, match='triton cannot run, since there is no CUDA device'
    ):
        q_shift(tokens((1, 2), 4, 0), (1, 2), backend='triton')
