"""Q-Shift: definition, adjoint, backends, registration, bad input."""

import pytest
import torch

from linvis_ops import q_shift
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


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('class_token', [0, 1])
@pytest.mark.parametrize(('hw', 'channels'), CASES)
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_and_its_gradient_equal_the_definition(
    backend, device, hw, channels, class_token, dtype
):
    # the interpreter rounds bfloat16 its own way
    rtol = 1e-2 if interpreting() and dtype == torch.bfloat16 else 0
    x = tokens(hw, channels, class_token, dtype=dtype, device=device).requires_grad_()
    gy = torch.randn_like(x)
    y = q_shift(x, hw, backend=backend)
    expected = q_shift(x, hw, backend='reference')
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=rtol, atol=0)
    (gradient,) = torch.autograd.grad(y, x, gy)
    (expected_gradient,) = torch.autograd.grad(expected, x, gy)
    torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=0)


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_non_contiguous_input(backend, device):
    x = torch.randn(2, 8, 12, device=device).transpose(1, 2)
    y = q_shift(x, (3, 4), backend=backend)
    torch.testing.assert_close(y, q_shift(x.contiguous(), (3, 4), backend='reference'))


def test_gradcheck_and_second_derivative():
    x = tokens((3, 2), 5, 1, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: q_shift(t, (3, 2)), (x,))
    assert torch.autograd.gradgradcheck(lambda t: q_shift(t, (3, 2)), (x,))


@pytest.mark.parametrize('adjoint', [False, True])
def test_opcheck(adjoint):
    x = torch.randn(2, 8, 12).transpose(1, 2).requires_grad_()
    torch.library.opcheck(q_shift_op, (x, 3, 4, adjoint, 'torch'))


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


@pytest.mark.parametrize(
    ('x', 'hw', 'error', 'message'),
    [
        (torch.zeros(2, 12), (3, 4), ValueError, r'x must be \(B, T, C\), got \(2, 12\)'),
        (torch.zeros(2, 14, 4), (3, 4), ValueError, r'stands for 12 tokens \(13 with .*got 14'),
        (torch.zeros(2, 12, 4), (0, 4), ValueError, r'hw must be \(rows, columns\)'),
        (torch.zeros(2, 12, 4).long(), (3, 4), TypeError, r'got torch.int64'),
        ([1.0], (3, 4), TypeError, r'x must be a tensor, got list'),
    ],
)
def test_bad_input_is_refused_in_one_sentence(x, hw, error, message):
    with pytest.raises(error, match=message):
        q_shift(x, hw)
