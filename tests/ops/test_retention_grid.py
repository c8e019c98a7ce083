"""Triton kernels of retention on grids: against float64, in every division.

Sizes are B, T, H, K, V, in that order; grids are (rows, columns).
"""

import pytest
import torch

from linvis_ops import retention
from linvis_ops._triton import interpreting
from linvis_ops.retention.launch_grid import RULES, UNEVEN, GridLaunch, launch_for
from linvis_ops.retention.reference import retention_backward, retention_parallel
from linvis_ops.testing import assert_matches, gradients, retention_inputs

F64 = torch.float64
NAMES = ('dq', 'dk', 'dv')
DTYPES = {'f32': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}

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
directions = pytest.mark.parametrize('direction', ['causal', 'bidirectional'])
not_interpreted = pytest.mark.skipif(interpreting(), reason='long in the interpreter')


def some_interpreted(interpreted, *others):
    return [*interpreted, *(pytest.param(value, marks=not_interpreted) for value in others)]


def detached(inputs):
    return [t.detach() for t in inputs]


def check_against_float64(inputs, hw, direction, judge='reference'):
    *tokens, log_gamma = inputs
    dtype, device = tokens[0].dtype, tokens[0].device
    exact = [t.detach().cpu().double().requires_grad_() for t in tokens]
    short = [t.detach().requires_grad_() for t in tokens]
    go = torch.randn(tokens[2].shape, dtype=F64).to(dtype)
    y64 = retention(*exact, log_gamma.cpu().double(), hw, direction, backend=judge)
    plain = retention(*short, log_gamma, hw, direction, backend=judge)
    y = retention(*inputs, hw, direction, backend='triton')
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


# Against float64

# grid and number of class tokens
GRIDS = some_interpreted(
    [((2, 2), 0), ((5, 3), 1)],
    ((1, 70), 1), ((70, 1), 1), ((35, 2), 1), ((2, 35), 1), ((3, 100), 0), ((14, 14), 1),
    ((16, 16), 1), ((33, 31), 1), ((40, 40), 1), ((64, 50), 0), ((130, 9), 1),
)  # fmt: skip
grids = pytest.mark.parametrize('grid', GRIDS, ids=str)


@pytest.mark.parametrize('dtype', some_interpreted(['f32'], 'bf16', 'f16'))
@directions
@grids
@devices
def test_matches_float64(device, grid, direction, dtype):
    hw, class_tokens = grid
    inputs = retention_inputs(1, hw[0] * hw[1] + class_tokens, 2, 16, 32, DTYPES[dtype], device)
    check_against_float64(inputs, hw, direction)


WIDTHS = some_interpreted(
    [], (64, 64), (128, 128), (64, 128), (128, 64), (16, 64), (64, 16), (1, 1), (5, 7), (48, 100)
)


@pytest.mark.gpu
@pytest.mark.parametrize('hw', [(11, 13), (40, 45)], ids=str)
@pytest.mark.parametrize('dtype', DTYPES)
@directions
@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_matches_float64_at_other_widths(widths, direction, dtype, hw):
    inputs = retention_inputs(1, hw[0] * hw[1] + 1, 2, *widths, DTYPES[dtype], 'cuda')
    check_against_float64(inputs, hw, direction)


@pytest.mark.gpu
@pytest.mark.parametrize('values', ['random', 'equal', 'large'])
@pytest.mark.parametrize('gamma', [0.0, 1.0, 1 - 1e-6, 0.999, 0.5, 1e-30])
@directions
@pytest.mark.parametrize('dtype', ['f32', 'bf16'])
def test_extreme_inputs_are_finite_and_right(dtype, direction, gamma, values):
    inputs = retention_inputs(1, 35 * 38, 2, 8, 8, DTYPES[dtype], 'cuda', gamma=gamma)
    with torch.no_grad():
        for tensor in inputs[:3]:
            if values == 'equal':
                tensor.fill_(0.5)
            elif values == 'large':
                tensor *= 80
    check_against_float64(inputs, (35, 38), direction)


@pytest.mark.gpu
@pytest.mark.parametrize('hw', [(64, 64), (2, 2048), (2050, 2)], ids=str)
@directions
def test_long_grids_match_float64(direction, hw):
    inputs = retention_inputs(1, hw[0] * hw[1] + 1, 2, 8, 8, device='cuda', gamma=0.999)
    # chunked in float64: equal to the definition by the tests of test_retention.py
    check_against_float64(inputs, hw, direction, judge='torch')


@pytest.mark.gpu
@pytest.mark.parametrize(('hw', 'class_tokens'), [((14, 14), 1), ((32, 32), 1), ((64, 64), 0)])
@directions
def test_sizes_of_the_network_match_float64(direction, hw, class_tokens):
    inputs = retention_inputs(2, hw[0] * hw[1] + class_tokens, 2, 64, 64, torch.bfloat16, 'cuda')
    check_against_float64(inputs, hw, direction)


# rows and columns of the grid, of a block, of a tile; class tokens
DIVISIONS = {
    'one tile': ((5, 6), (4, 4), (8, 8), 1),
    'bands': ((9, 6), (4, 4), (4, 8), 0),
    'strips': ((3, 9), (4, 4), (4, 4), 1),
    'tiles': ((5, 9), (4, 4), (4, 4), 0),
    'class token alone in a tile': ((8, 6), (8, 2), (8, 4), 1),
}


@pytest.mark.parametrize(
    ('division', 'direction', 'dtype'),
    [
        ('one tile', 'causal', 'bf16'),
        ('one tile', 'bidirectional', 'f32'),
        ('bands', 'causal', 'f32'),
        ('strips', 'bidirectional', 'f32'),
        ('tiles', 'causal', 'bf16'),
        pytest.param('tiles', 'bidirectional', 'f16', marks=not_interpreted),
        ('class token alone in a tile', 'bidirectional', 'bf16'),
        ('class token alone in a tile', 'causal', 'f32'),
    ],
)
@devices
def test_every_division_computes_the_definition(device, division, direction, dtype):
    from linvis_ops.retention import kernels_triton_grid

    hw, block, tile, class_tokens = DIVISIONS[division]
    tokens = hw[0] * hw[1] + class_tokens
    dtype = DTYPES[dtype]
    # two slices of values where a factor takes four bytes, and so of the gradient by these keys
    keys = 20 if division == 'bands' else 6
    *inputs, log_gamma = retention_inputs(1, tokens, 1, keys, 20, dtype, device, gamma=0.9)
    inputs = detached(inputs)
    launch = GridLaunch(*block, *tile, state_bytes=1024)
    bidirectional = direction == 'bidirectional'
    exact = [t.cpu().double() for t in (*inputs, log_gamma)]
    go = torch.randn(inputs[2].shape).to(device, dtype)
    rest = (hw[1], bidirectional, 0.7)
    actual = kernels_triton_grid.retention_forward(*inputs, log_gamma, *rest, launch)
    assert_matches('y', actual.cpu(), retention_parallel(*exact, *rest), None, dtype)
    actual = kernels_triton_grid.retention_backward(go, *inputs, log_gamma, *rest, launch)
    expected = retention_backward(go.cpu().double(), *exact, *rest)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_matches(name, a.cpu(), e, None, dtype)


# Properties


@devices
def test_nothing_leaks_from_the_future(device):
    q, k, v, log_gamma = detached(retention_inputs(1, 13, 1, 3, 4, device=device))
    k2, v2 = k.clone(), v.clone()
    k2[:, 5] += 1e3
    v2[:, 5] -= 1e3
    y, other = (retention(q, *kv, log_gamma, (3, 4), backend='triton') for kv in ((k, v), (k2, v2)))
    # row 1, column 1: seen from there, below and to the right, and by the class token
    changed = (y != other).any(-1).flatten().nonzero().flatten().tolist()
    assert changed == [5, 6, 7, 9, 10, 11, 12]


@directions
@devices
def test_heads_and_pictures_do_not_mix(device, direction):
    q, k, v, log_gamma = retention_inputs(2, 12, 3, 5, 6, device=device)
    y = retention(q, k, v, log_gamma, (3, 4), direction, backend='triton')
    some = [t[1:2, :, 1:2] for t in (q, k, v)]
    alone = retention(*some, log_gamma[1:2], (3, 4), direction, backend='triton')
    torch.testing.assert_close(alone, y[1:2, :, 1:2])


@directions
@devices
def test_non_contiguous_inputs(device, direction):
    x, k, v, log_gamma = detached(retention_inputs(1, 13, 2, 22, 10, device=device))
    # a part of one projection; heads before tokens in memory; every other value, which is copied
    views = [x[..., 4:10], k[..., :6].transpose(1, 2).contiguous().transpose(1, 2), v[..., ::2]]
    views = [t.requires_grad_() for t in views]
    dense = [t.detach().contiguous().requires_grad_() for t in views]
    y = retention(*views, log_gamma, (3, 4), direction, backend='triton')
    expected = retention(*dense, log_gamma, (3, 4), direction, backend='reference')
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    go = torch.randn(1, 2, 13, 5, device=device).transpose(1, 2)
    for a, e in zip(gradients(y, views, go), gradients(expected, dense, go), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('hw', [(7, 9), (45, 50)], ids=str)
@directions
def test_repeated_runs_are_bit_identical(direction, hw):
    inputs = retention_inputs(2, hw[0] * hw[1] + 1, 2, 48, 100, device='cuda')
    runs = []
    for _ in range(2):
        y = retention(*inputs, hw, direction, backend='triton')
        runs.append((y, *gradients(y, inputs[:3], torch.ones_like(y))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_the_token_of_a_large_tensor_is_found():
    q, k, v, log_gamma = retention_inputs(1, 12, 1, 16, 16, torch.bfloat16, 'cuda')
    # offsets of more than 32 bits
    far = torch.empty(12, 2**28, dtype=q.dtype, device='cuda')[:, :16].view(1, 12, 1, 16)
    far.copy_(k)
    y = retention(q, far, v, log_gamma, (3, 4), backend='triton')
    assert torch.equal(y, retention(q, k, v, log_gamma, (3, 4), backend='triton'))


# Divisions


@pytest.mark.parametrize('rule', [*RULES[0, 0].values(), UNEVEN], ids=str)
@pytest.mark.parametrize('rows', [2, 5, 15, 33, 65, 130, 4096])
@pytest.mark.parametrize('columns', [2, 3, 14, 32, 40, 64, 1000])
def test_division_is_of_whole_blocks_and_bounded_tiles(rows, columns, rule):
    launch = launch_for(rows, columns, rule)
    assert launch.block_rows * launch.block_columns == rule.length
    assert launch.tile_rows % launch.block_rows == launch.tile_columns % launch.block_columns == 0
    if rows * columns > rule.at_once:
        assert launch.tile_rows <= max(64, 2 * launch.block_rows)
        assert launch.tile_columns <= max(64, 2 * launch.block_columns)
    else:
        assert launch.tile_rows >= rows
        assert launch.tile_columns >= columns
