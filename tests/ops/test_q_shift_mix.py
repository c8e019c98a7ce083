"""Q-Shift with mixes: definition, norm, backends, registration, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from linvis_ops import BackendUnavailableError, q_shift, q_shift_mix
from linvis_ops._triton import interpreting
from linvis_ops.q_shift_mix.op import q_shift_mix_bwd, q_shift_mix_fwd
from linvis_ops.testing import assert_matches

F64 = torch.float64
DTYPES = {'f32': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}
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
NORMS = pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
# grid, channels, heads, class token, weights
CASES = [
    pytest.param((1, 1), 4, 1, 0, 1, id='1x1-C4'),
    pytest.param((3, 4), 8, 1, 1, 3, id='3x4-C8-class'),
    pytest.param((5, 1), 12, 1, 0, 2, id='5x1-C12'),
    pytest.param((1, 6), 7, 1, 1, 2, id='1x6-C7-class'),
    pytest.param((2, 3), 3, 1, 0, 4, id='2x3-C3'),
    pytest.param((4, 3), 48, 3, 0, 2, id='4x3-C48-H3'),
    pytest.param((2, 2), 18, 2, 1, 1, id='2x2-C18-H2-class'),
    pytest.param((5, 6), 96, 1, 0, 3, id='5x6-C96'),
]


def inputs(hw, channels, class_token, weights, norm, dtype=torch.float32, device='cpu', batch=2):
    """x, mus, weight and bias of a norm; all require gradients."""
    side = F64 if dtype == F64 else torch.float32
    x = torch.randn(batch, hw[0] * hw[1] + class_token, channels, dtype=side) + 0.5
    rows = [torch.rand(channels, dtype=side) for _ in range(weights)]
    rows += [1 + torch.rand(channels, dtype=side), torch.randn(channels, dtype=side)] * norm
    tensors = [x.to(dtype), *rows]
    return [t.to(device).requires_grad_() for t in tensors]


def call(tensors, hw, norm, **kwargs):
    """The operator of x, mus and, with a norm, weight and bias."""
    x, *rows = tensors
    mus, affine = (rows[:-2], (*rows[-2:], 1e-5)) if norm else (rows, None)
    return q_shift_mix(x, hw, mus, norm=affine, **kwargs)


def outputs_and_gradients(tensors, grads, hw, norm, **kwargs):
    mixes = call(tensors, hw, norm, **kwargs)
    grads = [g.to(m) for g, m in zip(grads, mixes, strict=True)]
    return [*mixes, *torch.autograd.grad(mixes, tensors, grads)]


def check_against_float64(backend, hw, heads, norm, tensors):
    dtype = tensors[0].dtype
    weights = len(tensors) - 1 - 2 * norm
    grads = [torch.randn(tensors[0].shape).to(dtype).to(tensors[0].device) for _ in range(weights)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    reference, plain, result = (
        outputs_and_gradients(t, grads, hw, norm, heads=heads, backend=b)
        for t, b in ((exact, 'reference'), (tensors, 'reference'), (tensors, backend))
    )
    names = [f'mix {i}' for i in range(weights)] + ['dx'] + [f'dmu {i}' for i in range(weights)]
    names += ['dweight', 'dbias'] * norm
    for name, a, p, e in zip(names, result, plain, reference, strict=True):
        assert a.is_contiguous()
        # those by mus, weight and bias are float32 beside tokens of 16 bits
        assert_matches(name, a, e, p, a.dtype)
    assert all(mix.dtype == dtype for mix in result[:weights])


# Definition


def test_definition_by_hand():
    # a row of three tokens; from outside comes zero
    x = torch.arange(1.0, 13.0).view(1, 3, 4)
    mu = torch.tensor([0.5, 0.0, 0.25, 1.0])
    (mix,) = q_shift_mix(x, (1, 3), [mu], backend='reference')
    expected = torch.tensor([[0.5, 6, 0.75, 4], [3, 10, 1.75, 8], [7, 0, 2.75, 12]])[None]
    assert torch.equal(mix, expected)


@pytest.mark.parametrize('heads', [1, 3])
@pytest.mark.parametrize(('backend', 'device'), [*BACKENDS, ('reference', 'cpu')])
def test_weight_zero_gives_the_neighbours_and_weight_one_the_token(backend, device, heads):
    x = torch.randn(2, 13, 12, device=device)
    weights = [torch.zeros(12, device=device), torch.ones(12, device=device)]
    shifted, same = q_shift_mix(x, (3, 4), weights, heads=heads, backend=backend)
    assert torch.equal(shifted, q_shift(x, (3, 4), heads=heads))
    torch.testing.assert_close(same, x)


@NORMS
def test_class_token_is_the_token_itself_in_every_mix(norm):
    tensors = inputs((3, 4), 8, 1, 2, norm)
    first, second = call(tensors, (3, 4), norm, backend='reference')
    x, *rows = (t.detach() for t in tensors)
    expected = layer_norm(x, (8,), *rows[-2:]) if norm else x
    torch.testing.assert_close(first[:, -1], expected[:, -1])
    torch.testing.assert_close(second[:, -1], expected[:, -1])


def test_norm_comes_first_and_outside_stays_zero():
    x, mu, weight, bias = (t.detach() for t in inputs((3, 4), 8, 0, 1, True))
    (mix,) = q_shift_mix(x, (3, 4), [mu], norm=(weight, bias, 1e-3), backend='reference')
    (expected,) = q_shift_mix(layer_norm(x, (8,), weight, bias, 1e-3), (3, 4), [mu])
    torch.testing.assert_close(mix, expected)


@NORMS
@pytest.mark.parametrize(('hw', 'channels', 'heads', 'class_token', 'weights'), CASES[:-1])
def test_definition_has_right_derivatives(hw, channels, heads, class_token, weights, norm):
    tensors = inputs(hw, channels, class_token, weights, norm, F64, batch=1)

    def function(*tensors):
        return call(tensors, hw, norm, heads=heads, backend='reference')

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# Backends


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    head=st.integers(1, 9),
    heads=st.integers(1, 3),
    class_token=st.integers(0, 1),
    weights=st.integers(1, 4),
    norm=st.booleans(),
)
def test_plain_backend_equals_the_definition(
    rows, columns, head, heads, class_token, weights, norm
):
    hw = (rows, columns)
    tensors = inputs(hw, head * heads, class_token, weights, norm, F64)
    grads = [torch.randn_like(tensors[0]) for _ in range(weights)]
    result, expected = (
        outputs_and_gradients(tensors, grads, hw, norm, heads=heads, backend=backend)
        for backend in ('torch', 'reference')
    )
    for a, e in zip(result, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@NORMS
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(('hw', 'channels', 'heads', 'class_token', 'weights'), CASES)
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_matches_float64(
    backend, device, hw, channels, heads, class_token, weights, dtype, norm
):
    tensors = inputs(hw, channels, class_token, weights, norm, dtype, device)
    check_against_float64(backend, hw, heads, norm, tensors)


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
@pytest.mark.parametrize('hw', [(1, 12), (12, 1), (3, 4)])
def test_channels_that_pass_see_no_other_token(backend, device, hw):
    x = torch.randn(1, 12, 7, device=device, requires_grad=True)  # channels 4 to 6 pass
    mu = torch.rand(7, device=device)
    g = 1e-3 * torch.randn(1, 12, 7, device=device)
    for large in (1e5, torch.inf):
        g[:, 5] = large
        (mix,) = q_shift_mix(x, hw, [mu], backend=backend)
        (dx,) = torch.autograd.grad(mix, x, g)
        others = [token for token in range(12) if token != 5]
        torch.testing.assert_close(dx[:, others, 4:], g[:, others, 4:], rtol=1e-6, atol=0)


@NORMS
@pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1')
def test_pieces_of_lines_and_several_tiles_of_a_program_in_the_interpreter(monkeypatch, norm):
    from linvis_ops.q_shift_mix import kernels_triton_backward as kernels

    monkeypatch.setattr(kernels, 'TILE_PROGRAMS', 2)
    monkeypatch.setattr(kernels, 'LEAST_STEPS', 3)
    tensors = inputs((7, 5), 80, 1, 2, norm)
    check_against_float64('triton', (7, 5), 1, norm, tensors)


@pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1')
@pytest.mark.parametrize('class_token', [0, 1])
@pytest.mark.parametrize('hw', [(1, 40), (40, 1), (2, 30), (30, 3)])
def test_long_lines_and_several_strips_of_a_program_in_the_interpreter(
    monkeypatch, hw, class_token
):
    from linvis_ops.q_shift_mix import kernels_triton_backward as kernels

    monkeypatch.setattr(kernels, 'LEAST_STEPS', 3)
    monkeypatch.setattr(kernels, 'MOST_RUNS', 4)
    division = kernels.divide(2, *hw, bool(class_token), parts=2)
    assert max(division.strips) > 1
    check_against_float64('triton', hw, 1, False, inputs(hw, 12, class_token, 2, False))


@pytest.mark.gpu
@NORMS
@pytest.mark.parametrize(
    ('hw', 'class_token'),
    [((1, 1), 0), ((14, 14), 1), ((50, 84), 0), ((1, 20000), 0), ((9000, 2), 1)],
)
@pytest.mark.parametrize(
    ('channels', 'heads', 'dtype'),
    [
        (100, 1, torch.bfloat16),
        (192, 1, torch.bfloat16),
        (192, 3, torch.float16),
        (192, 1, torch.float32),
        (1024, 1, torch.bfloat16),
        (5000, 1, torch.bfloat16),
    ],
)
def test_gpu_matches_float64_at_sizes_of_networks(channels, heads, dtype, hw, class_token, norm):
    tensors = inputs(hw, channels, class_token, 3, norm, dtype, 'cuda')
    check_against_float64('triton', hw, heads, norm, tensors)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_takes_more_than_2_to_the_31_elements():
    hw, channels = (1024, 1024), 256
    pictures = 9  # of 2^28 elements
    x = torch.randn(1, hw[0] * hw[1], channels, device='cuda', dtype=torch.bfloat16)
    x = x.expand(pictures, -1, -1).contiguous().requires_grad_()
    mu = torch.rand(channels, device='cuda', requires_grad=True)
    (mix,) = q_shift_mix(x, hw, [mu], backend='triton')
    dx, dmu = torch.autograd.grad(mix, [x, mu], x.detach())
    one = x.detach()[:1].requires_grad_()
    (expected,) = q_shift_mix(one, hw, [mu], backend='triton')
    expected_dx, expected_dmu = torch.autograd.grad(expected, [one, mu], one.detach())
    for picture in range(pictures):
        assert torch.equal(mix[picture], expected[0])
        assert torch.equal(dx[picture], expected_dx[0])
    torch.testing.assert_close(dmu, pictures * expected_dmu, rtol=1e-4, atol=0)


@NORMS
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_non_contiguous_tensors(backend, device, norm):
    x, *rows = (t.detach() for t in inputs((3, 4), 12, 0, 2, norm, device=device))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2), *(r.repeat(2)[::2] for r in rows)]
    plain = [x, *(t.contiguous() for t in strided[1:])]
    grads = [torch.randn(2, 12, 12, device=device).transpose(1, 2)]
    grads.append(torch.ones(1, device=device).expand(2, 12, 12))
    result, expected = (
        outputs_and_gradients([t.requires_grad_() for t in tensors], grads, (3, 4), norm, backend=b)
        for tensors, b in ((strided, backend), (plain, 'reference'))
    )
    for a, e in zip(result, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@NORMS
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_mixes_that_are_not_used_have_no_gradient(backend, device, norm):
    tensors = inputs((3, 4), 8, 0, 3, norm, device=device)
    results = []
    for name in (backend, 'reference'):
        _, used, _ = call(tensors, (3, 4), norm, backend=name)
        results.append(torch.autograd.grad(used.square().sum(), tensors, materialize_grads=True))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert not results[0][1].any()
    assert not results[0][3].any()


@NORMS
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_repeated_runs_are_bit_identical(backend, device, norm):
    tensors = inputs((7, 9), 37, 1, 3, norm, device=device)
    grads = [torch.randn_like(tensors[0]) for _ in range(3)]
    runs = [outputs_and_gradients(tensors, grads, (7, 9), norm, backend=backend) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@NORMS
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_norm_of_equal_and_of_large_channels(backend, device, norm):
    # variance zero, and a mean far above the deviation
    x, *rows = inputs((2, 2), 16, 0, 1, norm, device=device)
    with torch.no_grad():
        x[0] = 3.0
        x[1] += 1000.0
    check_against_float64(backend, (2, 2), 1, norm, [x, *rows])


# Registration


def operator_arguments(device, norm, backend):
    x, *rows = (t.detach() for t in inputs((3, 4), 12, 1, 2, norm, device=device))
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    affine = rows[2:] if norm else [None, None]
    return x, rows[:2], *affine, backend


@NORMS
@pytest.mark.parametrize(
    ('backend', 'device'),
    [('torch', 'cpu'), pytest.param('triton', 'cuda', marks=pytest.mark.gpu)],
)
def test_opcheck(backend, device, norm):
    x, mus, weight, bias, backend = operator_arguments(device, norm, backend)
    grads = [torch.randn_like(x), torch.randn_like(x)]
    *_, stats = q_shift_mix_fwd(x, mus, weight, bias, 1e-5, 3, 4, 3, None, backend)
    stats = stats if norm else None
    torch.library.opcheck(
        q_shift_mix_bwd.definition, (grads, x, mus, weight, bias, stats, 3, 4, 3, backend)
    )
    for tensor in (x, *mus, *([weight, bias] if norm else [])):
        tensor.requires_grad_()
    torch.library.opcheck(
        q_shift_mix_fwd.definition, (x, mus, weight, bias, 1e-5, 3, 4, 3, None, backend)
    )


@NORMS
def test_compiles_without_graph_breaks_and_without_recompiling_for_a_new_size(norm):
    torch._dynamo.reset()  # the lambda of the other norm has the same code
    function = torch.compile(
        lambda tensors, rows, columns: [2 * m for m in call(tensors, (rows, columns), norm)],
        fullgraph=True,
        dynamic=True,
        backend='aot_eager',
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, rows, columns in ((2, 3, 4), (3, 5, 6), (4, 7, 2)):
            tensors = inputs((rows, columns), 8, 0, 2, norm, batch=batch)
            mixes = function(tensors, rows, columns)
            for mix, expected in zip(mixes, call(tensors, (rows, columns), norm), strict=True):
                torch.testing.assert_close(mix, 2 * expected)
            sum(mix.sum() for mix in mixes).backward()
            assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize('class_token', [0, 1])
def test_exports_with_a_dynamic_grid(class_token):
    class Layer(torch.nn.Module):
        def forward(self, grid, mu, weight, bias):
            x = torch.cat([grid.flatten(1, 2), grid[:, 0, :class_token]], 1)
            hw = tuple(grid.shape[1:3])
            return q_shift_mix(x, hw, (mu, 1 - mu), norm=(weight, bias, 1e-5))

    sizes = {n: torch.export.Dim(name, min=2, max=64) for n, name in ((1, 'rows'), (2, 'columns'))}
    rows = (torch.rand(8), torch.rand(8), torch.rand(8))
    program = torch.export.export(
        Layer(), (torch.randn(2, 3, 4, 8), *rows), dynamic_shapes=(sizes, None, None, None)
    )
    other = torch.randn(2, 5, 6, 8)
    for a, e in zip(program.module()(other, *rows), Layer()(other, *rows), strict=True):
        assert torch.equal(a, e)


@NORMS
@pytest.mark.parametrize(('backend', 'device'), [*BACKENDS, ('reference', 'cpu')])
def test_mixes_of_another_dtype_are_rounded_once(backend, device, norm):
    # float16: the interpreter cuts bfloat16 off instead of rounding
    tensors = inputs((3, 4), 8, 1, 2, norm, device=device)
    full = call(tensors, (3, 4), norm, backend=backend)
    short = call(tensors, (3, 4), norm, dtype=torch.float16, backend=backend)
    for a, b in zip(short, full, strict=True):
        assert a.dtype == torch.float16
        assert torch.equal(a, b.to(torch.float16))
    grads = [torch.randn_like(mix) for mix in short]
    result = torch.autograd.grad(short, tensors, grads)
    expected = torch.autograd.grad(full, tensors, [g.float() for g in grads])
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # one of them unused
    unused = call(tensors, (3, 4), norm, dtype=torch.float16, backend=backend)[0]
    (dx,) = torch.autograd.grad(unused.float().square().sum(), tensors[:1])
    assert torch.isfinite(dx).all()


@NORMS
@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference'])
def test_mixes_in_float64_of_float32_tokens(backend, norm):
    # Triton, where it can run, has no float64: 'auto' leaves both passes to another backend
    tensors = inputs((3, 4), 8, 1, 2, norm)
    mixes = call(tensors, (3, 4), norm, dtype=F64, backend=backend)
    expected = call(tensors, (3, 4), norm, backend='reference')
    grads = [torch.randn_like(mix) for mix in mixes]
    result = torch.autograd.grad(mixes, tensors, grads)
    plain = torch.autograd.grad(expected, tensors, [g.float() for g in grads])
    assert all(mix.dtype == F64 for mix in mixes)
    for a, e in zip([*mixes, *result], [*expected, *plain], strict=True):
        torch.testing.assert_close(a, e, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1')
def test_triton_refuses_mixes_in_float64_in_the_forward_pass():
    tensors = inputs((3, 4), 8, 1, 2, False)
    with pytest.raises(BackendUnavailableError, match=r'not torch\.float64'):
        call(tensors, (3, 4), False, dtype=F64, backend='triton')


@NORMS
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_autocast_does_not_touch_the_arithmetic(backend, norm):
    tensors = inputs((3, 4), 8, 1, 2, norm)
    expected = call(tensors, (3, 4), norm, backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixes = call(tensors, (3, 4), norm, backend=backend)
    for mix, e in zip(mixes, expected, strict=True):
        assert torch.equal(mix, e)


def test_pointwise_work_is_not_counted():
    tensors = inputs((3, 4), 8, 0, 2, True)
    with FlopCounterMode(display=False) as counter:
        sum(mix.sum() for mix in call(tensors, (3, 4), True)).backward()
    # entries: the operators have formulas, and are not merely unknown to the counter
    assert counter.get_flop_counts()['Global'] == {
        torch.ops.linvis.q_shift_mix_fwd: 0,
        torch.ops.linvis.q_shift_mix_bwd: 0,
    }


@pytest.mark.gpu
@NORMS
def test_runs_in_a_cuda_graph(norm):
    tensors = [t.detach() for t in inputs((14, 14), 192, 0, 3, norm, torch.bfloat16, 'cuda')]
    expected = call(tensors, (14, 14), norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(tensors, (14, 14), norm)
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)


# Bad input


def arguments(**changes):
    values = {'x': torch.zeros(2, 12, 8), 'hw': (3, 4), 'mus': [torch.zeros(8)], **changes}
    return values.pop('x'), values.pop('hw'), values.pop('mus'), values


ZEROS = torch.zeros(8)


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'x': torch.zeros(12, 8)}, ValueError, r'x must be \(B, T, C\), got \(12, 8\)'),
        ({'x': torch.zeros(2, 12, 8).long()}, TypeError, r'got torch.int64'),
        ({'hw': (3, 5)}, ValueError, r'stands for 15 tokens'),
        ({'mus': []}, ValueError, r'mus must hold at least one tensor'),
        ({'mus': ZEROS}, TypeError, r'mus must be a tuple of tensors, got Tensor'),
        ({'mus': [0.5]}, TypeError, r'mus\[0\] must be a tensor, got float'),
        ({'mus': [ZEROS, ZEROS[:7]]}, ValueError, r'mus\[1\] must be \(8,\), got \(7,\)'),
        ({'mus': [ZEROS.view(1, 1, 8)]}, ValueError, r'mus\[0\] must be \(8,\), got \(1, 1, 8\)'),
        ({'mus': [ZEROS.half()]}, TypeError, r'mus\[0\] must be torch.float32 beside'),
        ({'mus': [ZEROS.to('meta')]}, ValueError, r'x is on cpu and mus\[0\] on meta'),
        ({'heads': 3}, ValueError, r'heads must divide the 8 channels, got 3'),
        ({'heads': 0}, ValueError, r'heads must divide the 8 channels, got 0'),
        ({'dtype': torch.int8}, TypeError, r'bfloat16, float64 or None, got torch.int8'),
        ({'dtype': torch.float8_e4m3fn}, TypeError, r'or None, got torch.float8_e4m3fn'),
        ({'dtype': 'float16'}, TypeError, r"dtype must be float32, .* or None, got 'float16'"),
        ({'heads': 2.0}, TypeError, r'heads must be an int, got 2\.0'),
        ({'norm': (ZEROS, ZEROS)}, TypeError, r'norm must be \(weight, bias, eps\) or None'),
        ({'norm': (ZEROS, None, 1e-5)}, TypeError, r'bias must be a tensor, got NoneType'),
        ({'norm': (ZEROS[:4], ZEROS, 1e-5)}, ValueError, r'weight must be \(8,\), got \(4,\)'),
        ({'norm': (ZEROS, ZEROS, '1e-5')}, TypeError, r"eps must be a number, got '1e-5'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changes, error, message):
    x, hw, mus, options = arguments(**changes)
    with pytest.raises(error, match=message) as caught:
        q_shift_mix(x, hw, mus, **options)
    assert '\n' not in str(caught.value)


def test_unknown_backend_is_refused():
    x, hw, mus, _ = arguments()
    with pytest.raises(
        BackendUnavailableError,
        match="no backend 'tritn'; choose one of auto, triton, torch, reference",
    ):
        q_shift_mix(x, hw, mus, backend='tritn')
