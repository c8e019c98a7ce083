"""Triton kernels of retention: against float64, in every division, what they do not take.

Sizes are B, T, H, K, V, in that order.
"""

import pytest
import torch

from linvis_ops import available_backends, retention
from linvis_ops._triton import interpreting
from linvis_ops.retention.reference import retention_backward, retention_chunked
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


def check_against_float64(inputs, direction, judge='reference'):
    *tokens, log_gamma = inputs
    dtype, device = tokens[0].dtype, tokens[0].device
    exact = [t.detach().cpu().double().requires_grad_() for t in tokens]
    short = [t.detach().requires_grad_() for t in tokens]
    go = torch.randn(tokens[2].shape, dtype=F64).to(dtype)
    y64 = retention(*exact, log_gamma.cpu().double(), None, direction, backend=judge)
    plain = retention(*short, log_gamma, None, direction, backend=judge)
    y = retention(*inputs, None, direction, backend='triton')
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

SHORT = some_interpreted([1, 17], 2, 15, 16, 33, 63, 64, 65, 197, 256, 257, 300)


@pytest.mark.parametrize('dtype', some_interpreted(['f32', 'bf16'], 'f16'))
@directions
@pytest.mark.parametrize('tokens', SHORT)
@devices
def test_matches_float64(device, tokens, direction, dtype):
    inputs = retention_inputs(1, tokens, 2, 16, 32, DTYPES[dtype], device)
    check_against_float64(inputs, direction)


WIDTHS = some_interpreted(
    [(48, 3)], (64, 64), (128, 128), (16, 64), (64, 16), (1, 1), (5, 7), (48, 100), (100, 3)
)


@pytest.mark.parametrize('dtype', some_interpreted(['bf16'], 'f32', 'f16'))
@directions
@pytest.mark.parametrize('widths', WIDTHS, ids=str)
@devices
def test_matches_float64_at_other_widths(device, widths, direction, dtype):
    tokens = 9 if device == 'cpu' else 291
    inputs = retention_inputs(1, tokens, 2, *widths, DTYPES[dtype], device)
    check_against_float64(inputs, direction)


@pytest.mark.parametrize('values', some_interpreted(['random'], 'equal', 'large'))
@pytest.mark.parametrize('gamma', some_interpreted([0.0], 1.0, 1 - 1e-6, 0.999, 0.5, 1e-30))
@directions
@pytest.mark.parametrize('dtype', some_interpreted(['f32'], 'bf16'))
@devices
def test_extreme_inputs_are_finite_and_right(device, dtype, direction, gamma, values):
    tokens = 18 if device == 'cpu' else 345
    inputs = retention_inputs(1, tokens, 2, 8, 8, DTYPES[dtype], device, gamma=gamma)
    with torch.no_grad():
        for tensor in inputs[:3]:
            if values == 'equal':
                tensor.fill_(0.5)
            elif values == 'large':
                tensor *= 80
    check_against_float64(inputs, direction)


@pytest.mark.gpu
@pytest.mark.parametrize('gamma', [None, 1.0, 0.9])
@directions
def test_long_sequences_match_float64(direction, gamma):
    inputs = retention_inputs(2, 4100, 3, 4, 8, device='cuda', gamma=gamma)
    # chunked in float64: equal to the definition by the tests of test_retention.py
    check_against_float64(inputs, direction, judge='torch')


@pytest.mark.gpu
@pytest.mark.parametrize('tokens', [197, 1024])
@directions
def test_sizes_of_the_network_match_float64(direction, tokens):
    inputs = retention_inputs(2, tokens, 6, 64, 64, torch.bfloat16, 'cuda')
    check_against_float64(inputs, direction)


# tokens, tokens of a chunk, chunks of a segment
ONE_SEGMENT, TWO_SEGMENTS, LONG_SCAN = (37, 16, 3), (50, 16, 2), (130, 16, 1)
# keys and values as wide: gradients of one launch
THREE_SEGMENTS, LONG_SEGMENTS = (40, 16, 1), (90, 16, 2)


@pytest.mark.parametrize(
    ('division', 'direction', 'gamma', 'dtype'),
    [
        (ONE_SEGMENT, 'causal', None, 'f32'),
        (ONE_SEGMENT, 'bidirectional', 1.0, 'bf16'),
        (TWO_SEGMENTS, 'causal', 0.9, 'bf16'),
        (THREE_SEGMENTS, 'causal', 0.9, 'f32'),
        (LONG_SEGMENTS, 'bidirectional', 0.9, 'f32'),
        (THREE_SEGMENTS, 'bidirectional', None, 'f16'),
        # the scan takes several rounds
        (LONG_SCAN, 'causal', 0.99, 'f32'),
        pytest.param(LONG_SCAN, 'bidirectional', 0.99, 'f16', marks=not_interpreted),
        pytest.param(LONG_SCAN, 'bidirectional', 0.0, 'f32', marks=not_interpreted),
        pytest.param((200, 32, 2), 'causal', None, 'bf16', marks=not_interpreted),
        pytest.param((200, 32, 4), 'bidirectional', None, 'bf16', marks=not_interpreted),
        pytest.param((500, 64, 3), 'causal', 1.0, 'bf16', marks=not_interpreted),
        pytest.param((500, 64, 1), 'bidirectional', 1.0, 'bf16', marks=not_interpreted),
    ],
)
@devices
def test_every_division_computes_the_definition(device, division, direction, gamma, dtype):
    from linvis_ops._chunks import Launch
    from linvis_ops.retention.kernels_triton import retention_forward
    from linvis_ops.retention.kernels_triton_backward import retention_backward as backward

    tokens, length, segment = division
    chunks = -(-tokens // length)
    values = {LONG_SCAN: 16, THREE_SEGMENTS: 6, LONG_SEGMENTS: 6}.get(division, 20)
    dtype = DTYPES[dtype]
    heads = 2 if gamma is None else 1
    inputs = detached(retention_inputs(1, tokens, heads, 6, values, dtype, device, gamma=gamma))
    exact = [t.cpu().double() for t in inputs]
    go = torch.randn(inputs[2].shape).to(device, dtype)
    # two slices of 20 values, and of the gradients by keys of as many
    launch = Launch(length, chunks, segment, -(-chunks // segment), keys=16, values=16)
    bidirectional = direction == 'bidirectional'
    actual = retention_forward(*inputs, bidirectional, launch=launch)
    assert_matches('y', actual.cpu(), retention_chunked(*exact, 1, bidirectional), None, dtype)
    actual = backward(go, *inputs, bidirectional, launch=launch)
    expected = retention_backward(go.cpu().double(), *exact, 1, bidirectional)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_matches(name, a.cpu(), e, None, dtype)


# Properties


@devices
def test_nothing_leaks_from_the_future(device):
    q, k, v, log_gamma = detached(retention_inputs(1, 41, 1, 3, 4, device=device))
    k2, v2 = k.clone(), v.clone()
    k2[:, 20] += 1e3
    v2[:, 20] -= 1e3
    y, other = (retention(q, *kv, log_gamma, backend='triton') for kv in ((k, v), (k2, v2)))
    assert torch.equal((y != other).any(-1).flatten().cpu(), torch.arange(41) >= 20)


@pytest.mark.gpu
@pytest.mark.parametrize('tokens', [77, 600])
def test_reversed_tokens_reverse_the_bidirectional_output(tokens):
    q, k, v, log_gamma = retention_inputs(2, tokens, 2, 5, 6, device='cuda')
    y, other = (
        retention(*each, log_gamma, None, 'bidirectional', backend='triton')
        for each in ((q, k, v), (t.flip(1) for t in (q, k, v)))
    )
    torch.testing.assert_close(other.flip(1), y, rtol=1e-4, atol=1e-5)


@directions
@devices
def test_heads_and_pictures_do_not_mix(device, direction):
    q, k, v, log_gamma = retention_inputs(2, 18, 3, 5, 6, device=device)
    y = retention(q, k, v, log_gamma, None, direction, backend='triton')
    some = [t[1:2, :, 1:2] for t in (q, k, v)]
    alone = retention(*some, log_gamma[1:2], None, direction, backend='triton')
    torch.testing.assert_close(alone, y[1:2, :, 1:2])


@directions
@devices
def test_non_contiguous_inputs(device, direction):
    x, k, v, log_gamma = detached(retention_inputs(1, 17, 4, 22, 10, device=device))
    # a part of one projection; heads before tokens in memory; every other value, which is copied
    views = [x[..., 4:10], k[..., :6].transpose(1, 2).contiguous().transpose(1, 2), v[..., ::2]]
    views = [t.requires_grad_() for t in views]
    dense = [t.detach().contiguous().requires_grad_() for t in views]
    decays = log_gamma.repeat_interleave(2)[::2]
    y = retention(*views, decays, None, direction, backend='triton')
    expected = retention(*dense, log_gamma, None, direction, backend='reference')
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    go = torch.randn(1, 4, 17, 5, device=device).transpose(1, 2)
    for a, e in zip(gradients(y, views, go), gradients(expected, dense, go), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('tokens', [35, 700])
@directions
def test_repeated_runs_are_bit_identical(direction, tokens):
    inputs = retention_inputs(3, tokens, 2, 48, 100, device='cuda')
    runs = []
    for _ in range(2):
        y = retention(*inputs, None, direction, backend='triton')
        runs.append((y, *gradients(y, inputs[:3], torch.ones_like(y))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


# Divisions, and what is left to PyTorch


@pytest.mark.parametrize('uneven', [False, True])
@pytest.mark.parametrize('shape', [(1, 1, 1), (128, 300, 6), (1, 65536, 6), (64, 1024, 6)])
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize('width', [20, 64, 128])
def test_division_covers_the_sequence(shape, dtype, width, uneven):
    from linvis_ops.retention.launch import UNEVEN, launch_for

    q = torch.empty((*shape, width), device='meta', dtype=dtype)
    for of in ('fwd', 'bwd'):
        launch = launch_for(q, q, of, UNEVEN if uneven else None)
        assert (launch.chunks - 1) * launch.length < shape[1] <= launch.chunks * launch.length
        assert (launch.segments - 1) * launch.segment < launch.chunks
        assert launch.chunks <= launch.segments * launch.segment
        assert launch.keys >= width
        assert launch.segments == 1 or shape[1] > 256


@pytest.mark.parametrize(
    ('shape', 'segments', 'chunks'),
    [
        ((128, 197, 6), 1, 4),
        ((64, 1024, 6), 1, 16),
        ((16, 4096, 12), 1, 64),
        ((4, 16384, 6), 11, 24),
        ((1, 1000, 1), 16, 1),
    ],
)
def test_segments_are_equal_and_no_more_than_the_gpu_has_places_for(
    monkeypatch, shape, segments, chunks
):
    from linvis_ops import _chunks
    from linvis_ops.retention.launch import launch_for

    monkeypatch.setattr(_chunks, 'capability_and_processors', lambda _: ((9, 0), 132))
    q = torch.empty((*shape, 64), device='meta', dtype=torch.bfloat16)
    for of in ('fwd', 'bwd'):
        launch = launch_for(q, q, of)
        assert (launch.segments, launch.segment) == (segments, chunks)


@pytest.mark.parametrize(
    ('uneven', 'expected'),
    [(None, 4), ('width', 2), ('narrow', 2), ('stride', 2), ('start', 2), ('float32', 8)],
)
def test_uneven_rows_of_short_dtypes_get_programs_that_form_no_warpgroup(uneven, expected):
    from linvis_ops.retention.launch import rows_and_launch

    dtype = torch.float32 if uneven == 'float32' else torch.bfloat16
    key_width = {'width': 48, 'narrow': 128}.get(uneven, 64)
    q, k, v, _ = retention_inputs(1, 300, 2, key_width, 32 if uneven == 'narrow' else 64, dtype)
    if uneven in ('stride', 'float32'):
        q = torch.nn.functional.pad(q, (0, 1))[..., :-1]
    elif uneven == 'start':
        q = torch.zeros(q.numel() + 1, dtype=dtype)[1:].view(q.shape)
    rows, launch = rows_and_launch('fwd', None, q, k, v)
    assert launch.warps == expected
    assert rows.tensors[0].data_ptr() == q.data_ptr()


def test_wide_heads_and_float64_are_left_to_pytorch():
    inputs = retention_inputs(1, 6, 200, 3, 3)
    reason = available_backends('retention', *inputs)['triton']
    assert 'channels' not in (reason or '')
    assert reason is None or not interpreting()
    wide = available_backends('retention', *retention_inputs(1, 2, 1, 129, 3))['triton']
    assert wide == 'its kernels take heads of at most 128 channels, not 129'
    if interpreting():
        double = available_backends('retention', *retention_inputs(1, 2, 1, 3, 3, F64))['triton']
        assert 'not torch.float64' in double


@pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1')
@pytest.mark.parametrize('hw', [(1, 6), (6, 1)])
def test_a_grid_of_one_row_or_column_is_a_sequence(hw):
    # of one row with a class token, too
    inputs = retention_inputs(1, 7, 1, 3, 4)
    y = retention(*inputs, hw, backend='triton')
    assert torch.equal(y, retention(*inputs, backend='triton'))
