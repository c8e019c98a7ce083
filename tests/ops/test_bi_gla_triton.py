"""The Triton kernels of bi_gla: division of the work, and what they are given.

Sizes are B, T, H, K, V, in that order.
"""

import pytest
import torch

from linvis_ops import available_backends
from linvis_ops._triton import interpreting
from linvis_ops.bi_gla.reference import bi_gla_backward, bi_gla_chunked
from linvis_ops.testing import assert_matches, bi_gla_inputs

NAMES = ('dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd')
TRITON_DEVICES = [
    pytest.param(
        'triton',
        'cpu',
        marks=pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1'),
        id='triton-interpreter',
    ),
    pytest.param('triton', 'cuda', marks=pytest.mark.gpu, id='triton-cuda'),
]
not_interpreted = pytest.mark.skipif(interpreting(), reason='long in the interpreter')


@pytest.mark.parametrize(
    ('tokens', 'length', 'segment', 'gate', 'dtype'),
    [
        (37, 16, 3, None, torch.bfloat16),
        (50, 16, 2, None, torch.float32),
        (130, 16, 1, -0.5, torch.float16),  # the scan takes several rounds
        (20, 16, 2, 'mixed', torch.float32),
        (20, 16, 1, 'mixed', torch.bfloat16),
        pytest.param(37, 16, 1, None, torch.bfloat16, marks=not_interpreted),
        pytest.param(70, 32, 2, -1.0, torch.bfloat16, marks=not_interpreted),
        pytest.param(37, 16, 3, 'mixed', torch.float32, marks=not_interpreted),
        pytest.param(37, 16, 1, 'mixed', torch.bfloat16, marks=not_interpreted),
        pytest.param(37, 16, 2, -20.0, torch.float32, marks=not_interpreted),
    ],
)
@pytest.mark.parametrize(('backend', 'device'), TRITON_DEVICES)
def test_every_division_computes_the_definition(
    backend, device, tokens, length, segment, gate, dtype
):
    from linvis_ops._chunks import Launch
    from linvis_ops.bi_gla.kernels_triton import bi_gla_forward
    from linvis_ops.bi_gla.kernels_triton_backward import bi_gla_backward as triton_backward

    chunks = -(-tokens // length)
    segments = -(-chunks // segment)
    inputs = bi_gla_inputs(1, tokens, 1, 6, 20, dtype, device, gate=gate)
    given = [t.detach() for t in inputs]
    exact = [t.cpu().double() for t in given]
    go = torch.randn(given[2].shape).to(device, dtype)
    launch = Launch(length, chunks, segment, segments, keys=16, values=16)  # two slices of values
    actual, expected = bi_gla_forward(*given, launch=launch), bi_gla_chunked(*exact)
    assert_matches('y', actual.cpu(), expected, None, dtype)
    actual = triton_backward(go, *given, launch=launch)
    expected = bi_gla_backward(go.cpu().double(), *exact)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_matches(name, a.cpu(), e, None, dtype)


def check_both_passes(inputs, launches=(None, None)):
    from linvis_ops.bi_gla.kernels_triton import bi_gla_forward
    from linvis_ops.bi_gla.kernels_triton_backward import bi_gla_backward as triton_backward

    given = [t.detach() for t in inputs]
    exact = [t.cpu().double() for t in given]
    dtype = given[0].dtype
    go = torch.randn(given[2].shape).to(given[2])
    actual = bi_gla_forward(*given, launch=launches[0])
    assert_matches('y', actual.cpu(), bi_gla_chunked(*exact), None, dtype)
    actual = triton_backward(go, *given, launch=launches[1])
    expected = bi_gla_backward(go.cpu().double(), *exact)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_matches(name, a.cpu(), e, None, dtype)


@pytest.fixture
def flagged(monkeypatch):
    """Flags of the chunks, of the forward and of the backward pass, as they are computed."""
    from linvis_ops.bi_gla import kernels_triton, kernels_triton_backward

    passes = []

    def keep(rows, flags, *rest):
        passes.append(flags.cpu())
        return launch_by_tokens(rows, flags, *rest)

    launch_by_tokens = kernels_triton.launch_by_tokens
    for module in (kernels_triton, kernels_triton_backward):
        monkeypatch.setattr(module, 'launch_by_tokens', keep)
    yield passes
    assert len(passes) == 2


@pytest.mark.parametrize('segment', [5, 2])
@pytest.mark.parametrize(('backend', 'device'), TRITON_DEVICES)
def test_chunks_out_of_range_between_others(backend, device, segment, flagged):
    from linvis_ops._chunks import Launch

    inputs = bi_gla_inputs(1, 70, 1, 6, 20, torch.bfloat16, device)
    with torch.no_grad():
        inputs[3][:, 20:27] = -20.0
        inputs[4][:, 38] = -float('inf')
    launch = Launch(16, 5, segment, -(-5 // segment), keys=16, values=32)
    check_both_passes(inputs, (launch, launch))
    for of in flagged:  # of 16 tokens each: 20 to 26 and 38 are in the second and the third
        assert of.tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize(('backend', 'device'), TRITON_DEVICES)
def test_states_pass_through_a_chunk_out_of_range(backend, device, flagged):
    """In the channels whose gates are open."""
    from linvis_ops._chunks import Launch

    inputs = bi_gla_inputs(1, 70, 1, 6, 20, torch.float32, device, gate=-0.05)
    with torch.no_grad():
        inputs[3][:, 20:27, :, :2] = -20.0
        inputs[4][:, 37:40, :, 2:4] = -20.0
    launch = Launch(16, 5, 5, 1, keys=16, values=32)
    check_both_passes(inputs, (launch, launch))
    for of in flagged:
        assert of.tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize(('backend', 'device'), TRITON_DEVICES)
def test_pairs_on_the_wrong_side_may_overflow(backend, device, dtype, flagged):
    """Their decays are of positive exponents: finite in range, but not times large products."""
    rate = -2.57 if dtype == torch.bfloat16 else -0.65
    inputs = bi_gla_inputs(1, 32, 1, 16, 16, dtype, device, gate=rate, gate_dtype=torch.float32)
    with torch.no_grad():
        for each in inputs[:2]:
            each.abs_().add_(1).mul_(60 if dtype == torch.bfloat16 else 1e14)
        inputs[3][:, 0] = inputs[4][:, -1] = 0.0
    check_both_passes(inputs)
    assert not any(of.any() for of in flagged)


@pytest.mark.parametrize(('backend', 'device'), TRITON_DEVICES)
def test_chunks_in_range_are_not_computed_token_by_token(backend, device, flagged):
    check_both_passes(bi_gla_inputs(1, 70, 1, 6, 20, torch.bfloat16, device))
    assert not any(of.any() for of in flagged)


@pytest.mark.gpu
@pytest.mark.parametrize('gates', [torch.bfloat16, torch.float32], ids=['bf16', 'f32'])
@pytest.mark.parametrize('shape', [(2, 197, 3), (1, 1100, 2), (150, 300, 2)], ids=str)
def test_rules_at_the_widths_of_vig(shape, gates):
    check_both_passes(bi_gla_inputs(*shape, 32, 64, torch.bfloat16, 'cuda', gate_dtype=gates))


@pytest.mark.parametrize('shape', [(1, 1, 1), (128, 196, 3), (1, 65536, 6), (64, 1024, 6)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize('width', [20, 128])
def test_division_covers_the_sequence(shape, dtype, width):
    from linvis_ops.bi_gla.launch import launch_for

    q = torch.empty((*shape, width), device='meta', dtype=dtype)
    for of in ('fwd', 'bwd'):
        launch = launch_for(q, q, of)
        assert (launch.chunks - 1) * launch.length < shape[1] <= launch.chunks * launch.length
        assert (launch.segments - 1) * launch.segment < launch.chunks
        assert launch.chunks <= launch.segments * launch.segment
        assert launch.keys >= width
        assert launch.segments == 1 or shape[1] > 256


@pytest.mark.parametrize(
    ('shape', 'segments'),
    [
        ((128, 196, 3), 1),
        ((1, 256, 1), 1),
        ((64, 1024, 6), 1),
        ((16, 4096, 3), 11),
        ((4, 16384, 6), 22),
        ((1, 65536, 1), 512),
    ],
)
def test_segments_make_as_many_programs_as_run_at_once(monkeypatch, shape, segments):
    from linvis_ops import _chunks
    from linvis_ops.bi_gla import launch

    for module in (_chunks, launch):
        monkeypatch.setattr(module, 'capability_and_processors', lambda device: ((9, 0), 132))
    q = torch.empty((*shape, 32), device='meta', dtype=torch.bfloat16)
    assert launch.launch_for(q, q, 'fwd').segments == segments
    assert shape[0] * shape[2] * segments <= 4 * 132


@pytest.mark.parametrize(
    ('tokens', 'width', 'value_width', 'length', 'dtype', 'warps'),
    [
        (500, 32, 32, 32, torch.bfloat16, 8),
        (500, 32, 32, 64, torch.bfloat16, 2),
        (50, 32, 32, 128, torch.bfloat16, 2),  # one chunk of 64
        (500, 33, 32, 32, torch.float16, 2),  # keys are rows of products, too, and values are not
        (500, 32, 64, 32, torch.float16, 8),
        (500, 128, 128, 64, torch.float32, 8),  # not by tensor cores
    ],
)
def test_no_program_forms_a_warpgroup(tokens, width, value_width, length, dtype, warps):
    from linvis_ops._chunks import Rule
    from linvis_ops.bi_gla.launch import launch_for

    q, v = (
        torch.empty((1, tokens, 1, size), device='meta', dtype=dtype)
        for size in (width, value_width)
    )
    assert launch_for(q, v, 'bwd', Rule(length, warps=8)).warps == warps


def test_parts_of_one_projection_are_not_copied():
    from linvis_ops._chunks import rows_of

    x = torch.zeros(2, 9, 4 * 32 + 4 * 64)
    q, v = x[..., : 4 * 32].unflatten(-1, (4, 32)), x[..., 4 * 32 :].unflatten(-1, (4, 64))
    heads_first = torch.zeros(2, 4, 9, 32).transpose(1, 2)
    rows = rows_of(q, v, heads_first, length=16)
    given = (q, v, heads_first)
    assert [a.data_ptr() for a in rows.tensors] == [t.data_ptr() for t in given]
    strides = [stride for t in given for stride in t.stride()[:3]]
    assert [stride * rows.align for stride in rows.strides] == strides
    assert rows.align == 8
    (copy,) = rows_of(q[..., :1].expand(-1, -1, -1, 32), length=16).tensors
    assert copy.is_contiguous()


def test_heads_that_are_too_wide_are_left_to_pytorch():
    wide = torch.zeros(1, 2, 1, 129)
    reason = available_backends('bi_gla', wide)['triton']
    assert 'heads of at most 128 channels, not 129' in reason
