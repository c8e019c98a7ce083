"""Bidirectional gated linear attention: definition, equal forms, gradients, backends, registration.

Sizes are B, T, H, K, V, in that order.
"""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from linvis_ops import BackendUnavailableError, bi_gla
from linvis_ops._triton import interpreting
from linvis_ops.bi_gla.op import bi_gla_bwd, bi_gla_fwd
from linvis_ops.bi_gla.reference import (
    bi_gla_backward,
    bi_gla_chunked,
    bi_gla_quadratic,
    bi_gla_recurrent,
)
from linvis_ops.testing import assert_matches, bi_gla_inputs, gradients

F64 = torch.float64
NAMES = ('dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd')

BACKENDS = [
    pytest.param(
        'triton',
        'cpu',
        marks=pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1'),
        id='triton-interpreter',
    ),
    pytest.param('triton', 'cuda', marks=pytest.mark.gpu, id='triton-cuda'),
    pytest.param('torch', 'cpu', id='torch-cpu'),
    pytest.param('torch', 'cuda', marks=pytest.mark.gpu, id='torch-cuda'),
]
not_interpreted = pytest.mark.skipif(interpreting(), reason='long in the interpreter')


def some_interpreted(interpreted, *others):
    return [*interpreted, *(pytest.param(value, marks=not_interpreted) for value in others)]


TOKENS = some_interpreted([1, 33], 2, 15, 16, 17, 64, 65, 197)
COMPILED = [param for param in BACKENDS if param.id != 'triton-interpreter']


def detached(inputs):
    return [t.detach() for t in inputs]


def loop(q, k, v, g_fwd, g_bwd, scale):
    """The weights of the definition, pair by pair."""
    y = torch.zeros(v.shape, dtype=F64)
    batch, tokens, heads, width = q.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                for s in range(tokens):
                    weight = 0.0
                    for c in range(width):
                        pair = (q[b, t, h, c] * k[b, s, h, c]).item()
                        if s <= t:
                            weight += pair * math.exp(g_fwd[b, s + 1 : t + 1, h, c].sum().item())
                        if s >= t:
                            weight += pair * math.exp(g_bwd[b, t:s, h, c].sum().item())
                    y[b, t, h] += scale * weight / 2 * v[b, s, h]
    return y


# Definition


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_definition_single_token_counts_once_in_the_mean(backend):
    inputs = detached(bi_gla_inputs(2, 1, 3, 4, 5, F64))
    q, k, v, _, _ = inputs
    expected = 0.3 * (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(bi_gla(*inputs, scale=0.3, backend=backend), expected)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_definition_two_tokens_by_hand(backend):
    def sequence(first, second):
        return torch.tensor([first, second], dtype=F64).view(1, 2, 1, 1)

    q, k, v = sequence(2, 3), sequence(5, 7), sequence(11, 13)
    # the first forward gate and the last backward gate act on a state of zero
    g_fwd, g_bwd = sequence(-3, math.log(1 / 2)), sequence(math.log(1 / 4), -3)
    # forward states 55 and 55 / 2 + 91, backward states 91 / 4 + 55 and 91
    expected = sequence(2 * (55 + 77.75) / 2, 3 * (118.5 + 91) / 2)
    torch.testing.assert_close(bi_gla(q, k, v, g_fwd, g_bwd, 1.0, backend=backend), expected)


def test_definition_equals_loop():
    inputs = bi_gla_inputs(2, 7, 2, 3, 2, F64)
    inputs = [*inputs[:3], inputs[3] * 20, inputs[4] * 20]
    torch.testing.assert_close(bi_gla_quadratic(*inputs, 0.7), loop(*detached(inputs), 0.7))


def test_scale_defaults_to_the_root_of_the_key_width():
    inputs = bi_gla_inputs(1, 5, 2, 9, 4)
    for backend in ('torch', 'reference'):
        expected = bi_gla(*inputs, scale=1 / 3, backend=backend)
        torch.testing.assert_close(bi_gla(*inputs, backend=backend), expected)


# Properties


@pytest.mark.parametrize(('backend', 'device'), COMPILED)
def test_reversed_tokens_and_exchanged_gates_reverse_the_output(backend, device):
    inputs = bi_gla_inputs(2, 37, 2, 5, 6, device=device)
    y = bi_gla(*inputs, backend=backend)
    q, k, v, g_fwd, g_bwd = (t.flip(1) for t in inputs)
    flipped = bi_gla(q, k, v, g_bwd, g_fwd, backend=backend)
    torch.testing.assert_close(flipped.flip(1), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('backend', 'device'), COMPILED)
def test_open_gates_give_linear_attention(backend, device):
    q, k, v, g_fwd, g_bwd = bi_gla_inputs(2, 33, 2, 4, 6, device=device, gate=0.0)
    y = bi_gla(q, k, v, g_fwd, g_bwd, 1.0, backend=backend)
    weight = torch.einsum('bthk,bshk->bhts', q, k) / 2
    expected = torch.einsum('bhts,bshv->bthv', weight, v)
    expected = expected + (q * k).sum(-1, keepdim=True) * v / 2  # itself, a second time
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('gate', some_interpreted([-math.inf], -200.0))
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_shut_gates_leave_the_token_itself(backend, device, gate):
    q, k, v, g_fwd, g_bwd = bi_gla_inputs(2, 33, 2, 4, 6, device=device, gate=gate)
    y = bi_gla(q, k, v, g_fwd, g_bwd, 1.0, backend=backend)
    torch.testing.assert_close(y, (q * k).sum(-1, keepdim=True) * v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_heads_and_pictures_do_not_mix(backend, device):
    inputs = bi_gla_inputs(3, 18, 4, 5, 6, device=device)
    y = bi_gla(*inputs, backend=backend)
    some = [t[1:2, :, 2:3] for t in inputs]
    torch.testing.assert_close(bi_gla(*some, backend=backend), y[1:2, :, 2:3])


# Equal forms


@pytest.mark.parametrize('chunk', [1, 2, 4, 16, 64])
@pytest.mark.parametrize('tokens', [1, 2, 15, 16, 17, 50])
def test_chunked_equals_quadratic(tokens, chunk):
    inputs = detached(bi_gla_inputs(2, tokens, 2, 3, 5, F64))
    torch.testing.assert_close(
        bi_gla_chunked(*inputs, chunk=chunk), bi_gla_quadratic(*inputs), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize('tokens', [1, 2, 50])
def test_recurrent_equals_quadratic(tokens):
    inputs = detached(bi_gla_inputs(2, tokens, 2, 3, 5, F64))
    torch.testing.assert_close(
        bi_gla_recurrent(*inputs), bi_gla_quadratic(*inputs), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize('tokens', [1000, 4096])
def test_chunked_equals_recurrent_on_long_sequences(tokens):
    inputs = detached(bi_gla_inputs(1, tokens, 1, 4, 4, F64))
    torch.testing.assert_close(
        bi_gla_chunked(*inputs), bi_gla_recurrent(*inputs), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize('chunk', [0, 3, 24])
def test_chunk_that_is_no_power_of_two_is_refused(chunk):
    with pytest.raises(ValueError, match=f'chunk must be a power of two, got {chunk}'):
        bi_gla_chunked(*bi_gla_inputs(1, 5, 1, 2, 2), chunk=chunk)


# Gradients


@pytest.mark.parametrize('form', [bi_gla_quadratic, bi_gla_recurrent, bi_gla])
def test_gradcheck(form):
    function = lambda *args: form(*args, 0.3)  # noqa: E731
    assert torch.autograd.gradcheck(function, bi_gla_inputs(2, 6, 1, 2, 3, F64))


@pytest.mark.parametrize('gate', [None, -1.0, 0.0])
@pytest.mark.parametrize('chunk', [1, 4, 16])
@pytest.mark.parametrize('tokens', [1, 2, 17, 40])
def test_hand_written_backward_equals_autograd(tokens, chunk, gate):
    inputs = bi_gla_inputs(2, tokens, 2, 3, 5, F64, gate=gate)
    y = bi_gla_quadratic(*inputs, 0.3)
    go = torch.randn_like(y)
    actual = bi_gla_backward(go, *detached(inputs), 0.3, chunk=chunk)
    for name, a, e in zip(NAMES, actual, gradients(y, inputs, go), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f'{n}: {m}')


def test_reference_backend_has_second_derivatives():
    function = lambda *args: bi_gla(*args, backend='reference')  # noqa: E731
    assert torch.autograd.gradgradcheck(function, bi_gla_inputs(1, 4, 1, 2, 2, F64))


# Backends against float64


def check_against_float64(backend, device, inputs):
    dtype = inputs[0].dtype
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    short = [t.detach().requires_grad_() for t in inputs]
    go = torch.randn(inputs[2].shape, dtype=F64).to(dtype)
    y64 = bi_gla(*exact, backend='reference')
    plain = bi_gla(*short, backend='reference')
    y = bi_gla(*inputs, backend=backend)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_matches('y', y.cpu(), y64, plain.cpu(), dtype)
    g64 = gradients(y64, exact, go.double())
    g_plain = gradients(plain, short, go.to(device))
    g = gradients(y, inputs, go.to(device))
    for name, tensor, a, p, e in zip(NAMES, inputs, g, g_plain, g64, strict=True):
        assert a.dtype == tensor.dtype
        # gates in float32 do not make their gradient more precise than the other inputs
        assert_matches(name, a.cpu(), e, p.cpu(), dtype)


@pytest.mark.parametrize(
    'dtype',
    [
        pytest.param(torch.float32, id='f32'),
        pytest.param(torch.float16, id='f16', marks=not_interpreted),
        pytest.param(torch.bfloat16, id='bf16'),
    ],
)
@pytest.mark.parametrize('tokens', TOKENS)
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_matches_float64(backend, device, tokens, dtype):
    inputs = bi_gla_inputs(1, tokens, 2, 16, 32, dtype, device)
    check_against_float64(backend, device, inputs)


WIDTHS = some_interpreted(
    [(5, 7)], (16, 16), (16, 64), (32, 64), (64, 32), (64, 64), (1, 1), (48, 100)
)


@pytest.mark.parametrize('widths', WIDTHS, ids=str)
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_matches_float64_at_other_widths(backend, device, widths):
    inputs = bi_gla_inputs(1, 37, 2, *widths, device=device)
    check_against_float64(backend, device, inputs)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['f16', 'bf16'])
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_gates_in_float32_beside_a_shorter_dtype(backend, device, dtype):
    inputs = bi_gla_inputs(2, 40, 2, 16, 32, dtype, device, gate_dtype=torch.float32)
    check_against_float64(backend, device, inputs)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_plain_pytorch_rounds_short_dtypes_once(backend):
    short = bi_gla_inputs(2, 40, 2, 16, 32, torch.bfloat16)
    long = [t.detach().float().requires_grad_() for t in short]
    y, y_long = bi_gla(*short, backend=backend), bi_gla(*long, backend=backend)
    assert torch.equal(y, y_long.bfloat16())
    go = torch.randn_like(y)
    g, g_long = gradients(y, short, go), gradients(y_long, long, go)
    for name, a, e in zip(NAMES, g, g_long, strict=True):
        assert torch.equal(a, e.bfloat16()), name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize('tokens', some_interpreted([9], 33, 130))
@pytest.mark.parametrize('gate', some_interpreted([-20.0, 'mixed'], 0.0))
@pytest.mark.parametrize('values', some_interpreted(['random'], 'equal'))
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_extreme_inputs_are_finite_and_right(backend, device, values, gate, tokens, dtype):
    inputs = bi_gla_inputs(1, tokens, 2, 8, 8, dtype, device, gate=gate)
    if values == 'equal':
        with torch.no_grad():
            for tensor in inputs[:3]:
                tensor.fill_(0.5)
    check_against_float64(backend, device, inputs)


@pytest.mark.parametrize('gate', some_interpreted([-0.5], -1e-3, 'mixed'))
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_long_sequences_match_float64(backend, device, gate):
    tokens = 260 if backend == 'triton' and device == 'cpu' else 4100
    inputs = bi_gla_inputs(1, tokens, 1, 4, 8, device=device, gate=gate)
    # chunked in float64: equal to the definition by the tests above
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    y64, y = bi_gla(*exact, backend='torch'), bi_gla(*inputs, backend=backend)
    assert_matches('y', y.cpu(), y64, None, torch.float32)
    go = torch.randn_like(y64)
    g64, g = gradients(y64, exact, go), gradients(y, inputs, go.to(device))
    for name, a, e in zip(NAMES, g, g64, strict=True):
        assert_matches(name, a.cpu(), e, None, torch.float32)


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_non_contiguous_inputs(backend, device):
    inputs = detached(bi_gla_inputs(2, 18, 3, 6, 10, device=device))
    # heads before tokens in memory; one gate for all channels
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[:4]]
    views.append(inputs[4][..., :1].expand(-1, -1, -1, 6))
    views = [t.requires_grad_() for t in views]
    dense = [t.detach().contiguous().requires_grad_() for t in views]
    y, expected = bi_gla(*views, backend=backend), bi_gla(*dense, backend='reference')
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    go = torch.randn(2, 3, 18, 10, device=device).transpose(1, 2)
    for a, e in zip(gradients(y, views, go), gradients(expected, dense, go), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('backend', 'device'), COMPILED)
def test_repeated_runs_are_bit_identical(backend, device):
    inputs = bi_gla_inputs(3, 35, 2, 6, 10, device=device)
    runs = []
    for _ in range(2):
        y = bi_gla(*inputs, backend=backend)
        runs.append((y, *gradients(y, inputs, torch.ones_like(y))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


# Registration


@pytest.mark.parametrize('dtype', [torch.float32, F64], ids=['f32', 'f64'])
def test_opcheck_forward(dtype):
    torch.library.opcheck(
        bi_gla_fwd.definition, (*bi_gla_inputs(2, 18, 3, 4, 5, dtype), 0.5, 'torch')
    )


def test_opcheck_forward_strided_with_gates_in_float32_and_the_scale_left_out():
    inputs = bi_gla_inputs(2, 3, 18, 4, 5, torch.bfloat16, gate_dtype=torch.float32)
    views = [t.detach().transpose(1, 2) for t in inputs]
    torch.library.opcheck(bi_gla_fwd.definition, (*views, None, 'torch'))


@pytest.mark.parametrize('gate_dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_opcheck_backward(gate_dtype):
    inputs = detached(bi_gla_inputs(2, 18, 3, 4, 5, torch.bfloat16, gate_dtype=gate_dtype))
    go = torch.randn(2, 3, 18, 5).bfloat16().transpose(1, 2)
    torch.library.opcheck(bi_gla_bwd.definition, (go, *inputs, None, 'torch'))
    result = bi_gla_bwd(go, *inputs, None, 'torch')
    assert [t.dtype for t in result] == [t.dtype for t in inputs]


SCALES = {
    'default': lambda q: None,
    'number': lambda q: 0.5,
    'size': lambda q: q.shape[3] ** -0.5,
}


@pytest.mark.parametrize('scale', SCALES.values(), ids=SCALES)
def test_compiles_without_graph_breaks_and_without_recompiling_for_a_new_size(scale):
    torch._dynamo.reset()
    function = torch.compile(
        lambda *inputs: bi_gla(*inputs, scale(inputs[0])) * 2,
        fullgraph=True,
        dynamic=True,
        backend='aot_eager',
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 10), (3, 17), (4, 33)):
            inputs = bi_gla_inputs(batch, tokens, 6, 5, 7)
            y = function(*inputs)
            torch.testing.assert_close(y, 2 * bi_gla(*inputs, scale(inputs[0])))
            y.sum().backward()
            assert all(t.grad is not None for t in inputs)


@pytest.mark.parametrize('scale', SCALES.values(), ids=SCALES)
def test_exports_with_a_dynamic_number_of_tokens(scale):
    class Layer(torch.nn.Module):
        def forward(self, *inputs):
            return bi_gla(*inputs, scale(inputs[0]))

    tokens = torch.export.Dim('tokens', min=2, max=1024)
    program = torch.export.export(
        Layer(),
        tuple(detached(bi_gla_inputs(2, 10, 3, 4, 5))),
        dynamic_shapes=(tuple({1: tokens} for _ in range(5)),),
    )
    other = detached(bi_gla_inputs(2, 33, 3, 4, 5))
    torch.testing.assert_close(program.module()(*other), bi_gla(*other, scale(other[0])))


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_autocast_does_not_touch_the_arithmetic(backend):
    inputs = bi_gla_inputs(2, 20, 2, 4, 5)
    expected = bi_gla(*inputs, backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = bi_gla(*inputs, backend=backend)
    assert torch.equal(y, expected)


def test_runs_without_data():
    meta = bi_gla(*bi_gla_inputs(2, 20, 3, 4, 5, torch.bfloat16, 'meta'))
    with FakeTensorMode():
        inputs = bi_gla_inputs(2, 20, 3, 4, 5, torch.bfloat16, gate_dtype=torch.float32)
        fake = bi_gla(*inputs)
        grads = gradients(fake, inputs, torch.ones_like(fake))
    for y in (meta, fake):
        assert y.shape == (2, 20, 3, 5)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous()
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]


def test_flops_are_counted():
    inputs = bi_gla_inputs(2, 10, 3, 4, 5)
    with FlopCounterMode(display=False) as counter:
        bi_gla(*inputs).sum().backward()
    assert counter.get_total_flops() == 2 * (5 + 12) * 2 * 10 * 3 * 4 * 5


# Bad input


def changed(index, function):
    inputs = detached(bi_gla_inputs(2, 6, 3, 4, 5))
    inputs[index] = function(inputs[index])
    return inputs


@pytest.mark.parametrize(
    ('inputs', 'error', 'message'),
    [
        (changed(1, lambda k: k[:, :5]), ValueError, r'got q \(2, 6, 3, 4\), k \(2, 5, 3, 4\)'),
        (changed(2, lambda v: v[:, :5]), ValueError, r'q and v must agree in \(B, T, H\), got q'),
        (changed(2, lambda v: v[0]), ValueError, r'v must be \(B, T, H, V\), got \(6, 3, 5\)'),
        (changed(0, lambda q: q[:, :0]), ValueError, r'q must not be empty, got \(2, 0, 3, 4\)'),
        (changed(3, lambda g: g[..., :1]), ValueError, r'q and g_fwd must have one shape'),
        (changed(4, lambda g: g.half()), TypeError, r'g_bwd must be torch.float32 beside'),
        (changed(3, lambda g: g.double()), TypeError, r'got torch.float64; cast it first'),
        (changed(1, lambda k: k.half()), TypeError, r'got torch.float32 and torch.float16'),
        (changed(0, lambda q: q.long()), TypeError, r'q must be float32, .* got torch.int64'),
        (changed(4, lambda g: g.to('meta')), ValueError, r'q is on cpu and g_bwd on meta'),
        (changed(2, lambda v: 3.0), TypeError, r'v must be a tensor, got float'),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(inputs, error, message):
    with pytest.raises(error, match=message) as caught:
        bi_gla(*inputs)
    assert '\n' not in str(caught.value)


def test_gates_of_two_dtypes_are_refused():
    q, k, v, g_fwd, g_bwd = bi_gla_inputs(1, 3, 1, 2, 2, torch.bfloat16)
    with pytest.raises(TypeError, match='g_fwd and g_bwd must have one dtype'):
        bi_gla(q, k, v, g_fwd.float(), g_bwd)
    with pytest.raises(
        TypeError, match=r'must be torch\.bfloat16 or torch\.float32 beside torch\.bfloat16 q'
    ):
        bi_gla(q, k, v, g_fwd.half(), g_bwd)


def test_scale_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match='scale must be a number or None, got Tensor'):
        bi_gla(*bi_gla_inputs(1, 3, 1, 2, 2), torch.ones(()))


def test_unknown_backend_is_refused():
    with pytest.raises(BackendUnavailableError, match="no backend 'tritn'; choose one of auto, "):
        bi_gla(*bi_gla_inputs(1, 3, 1, 2, 2), backend='tritn')
