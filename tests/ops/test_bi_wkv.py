"""Bi-WKV: definition, properties, equal forms, gradients, backends, registration."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linvis_ops import BackendUnavailableError, bi_wkv
from linvis_ops._triton import interpreting
from linvis_ops.bi_wkv import launch
from linvis_ops.bi_wkv.cuda import extension_error
from linvis_ops.bi_wkv.launch import DEFAULT, TUNED, by_rows, rows_between
from linvis_ops.bi_wkv.op import bi_wkv_bwd, bi_wkv_fwd
from linvis_ops.bi_wkv.reference import bi_wkv_backward, bi_wkv_chunked, bi_wkv_quadratic
from linvis_ops.testing import assert_matches, bi_wkv_inputs, gradients

F64 = torch.float64
NAMES = ('dw', 'du', 'dk', 'dv')

cuda = pytest.param('triton', 'cuda', marks=pytest.mark.gpu, id='triton-cuda')
built = pytest.mark.skipif(extension_error() is not None, reason=str(extension_error()))
extension = pytest.param('cuda', 'cuda', marks=[pytest.mark.gpu, built], id='extension-cuda')
interpreted = pytest.param(
    'triton',
    'cpu',
    marks=pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1'),
    id='triton-interpreter',
)
not_interpreted = pytest.mark.skipif(interpreting(), reason='long in the interpreter')
BACKENDS = [pytest.param('torch', 'cpu', id='torch-cpu'), interpreted, cuda, extension]


COMPILED = [param for param in BACKENDS if param is not interpreted]


def some_interpreted(values, *others):
    return [*values, *(pytest.param(value, marks=not_interpreted) for value in others)]


ON_GPU = [
    pytest.param('triton', marks=pytest.mark.gpu),
    pytest.param('cuda', marks=[pytest.mark.gpu, built]),
]


def loop(w, u, k, v):
    """The equation, number by number."""
    batch, tokens, channels = k.shape
    y = torch.zeros(v.shape, dtype=F64)
    for b in range(batch):
        for c in range(channels):
            for t in range(tokens):
                weights = [
                    math.exp(k[b, s, c] + (u[c] if s == t else -w[c] * (abs(t - s) - 1)))
                    for s in range(tokens)
                ]
                top = sum(e * v[b, s, c].item() for s, e in enumerate(weights))
                y[b, t, c] = top / sum(weights)
    return y


# Definition


def test_definition_single_token_returns_its_value():
    w, u, k, v = bi_wkv_inputs(2, 1, 3, F64)
    assert torch.equal(bi_wkv_quadratic(w, u, k, v), v)


def test_definition_two_tokens_by_hand():
    # at distance 1 the decay has no effect: weights are e^(k + u) for the token itself and e^k for
    # the other
    w, u = torch.tensor([7.0], dtype=F64), torch.tensor([math.log(3.0)], dtype=F64)
    k = torch.zeros(1, 2, 1, dtype=F64)
    v = torch.tensor([4.0, 8.0], dtype=F64).view(1, 2, 1)
    expected = torch.tensor([(3 * 4 + 8) / 4, (4 + 3 * 8) / 4], dtype=F64).view(1, 2, 1)
    torch.testing.assert_close(bi_wkv_quadratic(w, u, k, v), expected)


def test_definition_equals_loop():
    inputs = bi_wkv_inputs(2, 7, 3, F64, decay=1.0)
    torch.testing.assert_close(bi_wkv_quadratic(*inputs), loop(*[t.detach() for t in inputs]))


# Properties


@pytest.mark.parametrize(('backend', 'device'), COMPILED)
def test_reversed_tokens_reverse_the_output(backend, device):
    w, u, k, v = bi_wkv_inputs(2, 37, 5, device=device, decay=0.5)
    y = bi_wkv(w, u, k, v, backend=backend)
    flipped = bi_wkv(w, u, k.flip(1), v.flip(1), backend=backend)
    torch.testing.assert_close(flipped.flip(1), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('backend', 'device'), COMPILED)
def test_constant_value_is_returned(backend, device):
    w, u, k, v = bi_wkv_inputs(1, 40, 4, device=device, decay=1.0)
    y = bi_wkv(w, u, k, torch.full_like(v, 3.0), backend=backend)
    torch.testing.assert_close(y, torch.full_like(y, 3.0))


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_no_decay_and_equal_keys_give_the_mean(backend, device):
    w, _, k, v = bi_wkv_inputs(2, 33, 4, device=device)
    zero = torch.zeros_like(w)
    y = bi_wkv(zero, zero, torch.full_like(k, -70.0), v, backend=backend)
    torch.testing.assert_close(y, v.mean(1, keepdim=True).expand_as(y))


def test_shifted_keys_change_nothing():
    w, u, k, v = bi_wkv_inputs(1, 20, 4, F64)
    torch.testing.assert_close(bi_wkv(w, u, k + 500.0, v), bi_wkv(w, u, k, v))


# Equal forms


@pytest.mark.parametrize('chunk', [1, 2, 5, 16, 64])
@pytest.mark.parametrize('tokens', [1, 2, 15, 16, 17, 50])
def test_chunked_equals_quadratic(tokens, chunk):
    inputs = bi_wkv_inputs(2, tokens, 3, F64, decay=0.7)
    torch.testing.assert_close(
        bi_wkv_chunked(*inputs, chunk=chunk), bi_wkv_quadratic(*inputs), rtol=1e-10, atol=1e-12
    )


# Gradients


def test_gradcheck_of_the_definition():
    assert torch.autograd.gradcheck(bi_wkv_quadratic, bi_wkv_inputs(2, 6, 2, F64, decay=0.7))


def test_gradcheck_of_the_operator():
    assert torch.autograd.gradcheck(bi_wkv, bi_wkv_inputs(1, 19, 2, F64, decay=0.7))


@pytest.mark.parametrize('chunk', [1, 4, 16])
@pytest.mark.parametrize('tokens', [1, 2, 17, 40])
def test_hand_written_backward_equals_autograd(tokens, chunk):
    inputs = bi_wkv_inputs(2, tokens, 3, F64, decay=0.7)
    y = bi_wkv_quadratic(*inputs)
    gy = torch.randn_like(y)
    expected = gradients(y, inputs, gy)
    actual = bi_wkv_backward(gy, *[t.detach() for t in inputs], chunk=chunk)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f'{n}: {m}')


def test_reference_backend_has_second_derivatives():
    inputs = bi_wkv_inputs(1, 4, 2, F64)
    function = lambda *args: bi_wkv(*args, backend='reference')  # noqa: E731
    assert torch.autograd.gradgradcheck(function, inputs)


# Backends against float64


def check_against_float64(backend, device, dtype, inputs, factor=2.0, absolute=()):
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    short = [t.detach().requires_grad_() for t in inputs]
    gy = torch.randn(inputs[3].shape, dtype=F64).to(dtype)
    y64 = bi_wkv(*exact, backend='reference')
    plain = bi_wkv(*short, backend='reference')
    y = bi_wkv(*inputs, backend=backend)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_matches('y', y.cpu(), y64, plain.cpu(), dtype)
    g64 = gradients(y64, exact, gy.double())
    g_plain = gradients(plain, short, gy.to(device))
    g = gradients(y, inputs, gy.to(device))
    for name, tensor, a, p, e in zip(NAMES, inputs, g, g_plain, g64, strict=True):
        assert a.dtype == tensor.dtype
        if name in absolute:
            torch.testing.assert_close(a.cpu().double(), e, rtol=0, atol=1e-6)
        else:
            # those by w and u are float32 beside tokens of 16 bits: errors of 5e-8 to 3e-6
            assert_matches(name, a.cpu(), e, p.cpu(), a.dtype, factor)


@pytest.mark.parametrize(
    'dtype',
    [
        pytest.param(torch.float32, id='f32'),
        pytest.param(torch.float16, id='f16', marks=not_interpreted),
        pytest.param(torch.bfloat16, id='bf16'),
    ],
)
@pytest.mark.parametrize('tokens', some_interpreted([1, 17], 2, 15, 16, 33, 49))
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_matches_float64(backend, device, tokens, dtype):
    check_against_float64(backend, device, dtype, bi_wkv_inputs(2, tokens, 5, dtype, device))


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_backend_matches_float64_over_several_channel_blocks(backend, device):
    inputs = bi_wkv_inputs(1, 20, 131, torch.float32, device)
    check_against_float64(backend, device, torch.float32, inputs)


@pytest.mark.parametrize('tokens', some_interpreted([12], 50, 197))
@pytest.mark.parametrize('decay', some_interpreted([30.0], 0.0, 1.0, 2.0))
@pytest.mark.parametrize('keys', some_interpreted(['wide'], 'equal'))
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_extreme_inputs_are_finite_and_right(backend, device, keys, decay, tokens):
    w, u, k, v = bi_wkv_inputs(1, tokens, 8, device=device, decay=decay)
    with torch.no_grad():
        k.uniform_(-80, 80) if keys == 'wide' else k.fill_(-80.0)
    # Where one token dominates all others, by its key or since far tokens weigh more, v - y
    # cancels, in plain PyTorch too: README.md, Numerics.
    dominated = keys == 'wide' or decay > 1
    factor = 5.0 if dominated and backend in ('triton', 'cuda') else 2.0
    check_against_float64(backend, device, torch.float32, (w, u, k, v), factor)


@pytest.mark.parametrize('jump', [20.0, 60.0, -60.0])
@pytest.mark.parametrize('first', [5, 20, 40])
@pytest.mark.parametrize(('backend', 'device'), COMPILED)
def test_keys_that_jump_along_the_sequence(backend, device, first, jump):
    # kernels compute parts of a sequence whose keys are near that of its middle in another way
    w, u, k, v = bi_wkv_inputs(1, 50, 8, device=device)
    with torch.no_grad():
        k[:, first:] += jump
    factor = 5.0 if backend in ('triton', 'cuda') else 2.0  # few tokens dominate, as above
    check_against_float64(backend, device, torch.float32, (w, u, k, v), factor)


MASKED = {'end': slice(40, None), 'start': slice(0, 33), 'middle': slice(15, 49)}


@pytest.mark.parametrize('decay', some_interpreted([None], 30.0))
@pytest.mark.parametrize('masked', MASKED.values(), ids=MASKED)
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_keys_of_minus_infinity_take_tokens_out(backend, device, masked, decay):
    # whole blocks and chunks have none that is finite
    w, u, k, v = bi_wkv_inputs(1, 64, 8, device=device, decay=decay)
    with torch.no_grad():
        k[:, masked] = -torch.inf
        k[:, 50, 0] = 1.0  # other tokens in another channel
    inputs = (w, u, k, v)
    factor = 5.0 if decay and backend in ('triton', 'cuda') else 2.0  # few tokens dominate
    check_against_float64(backend, device, torch.float32, inputs, factor)
    y = bi_wkv(*inputs, backend=backend)
    _, _, dk, dv = gradients(y, inputs, torch.ones_like(y))
    out = k == -torch.inf
    assert not dk[out].any()
    assert not dv[out].any()


@pytest.mark.parametrize(('backend', 'device'), [*BACKENDS, ('reference', 'cpu')])
def test_channels_without_a_finite_key_are_nan(backend, device):
    w, u, k, v = bi_wkv_inputs(2, 33, 4, device=device)
    with torch.no_grad():
        k[1, :, 2] = -torch.inf
    inputs = (w, u, k, v)
    y = bi_wkv(*inputs, backend=backend)
    dw, du, dk, dv = gradients(y, inputs, torch.ones_like(y))
    without = torch.zeros_like(y, dtype=torch.bool)
    without[1, :, 2] = True
    for by_token in (y, dk, dv):
        assert torch.equal(by_token.isnan(), without)
    for by_channel in (dw, du):
        assert by_channel.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize('bonus', some_interpreted([-30.0], 30.0))
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_large_bonus_of_either_sign(backend, device, bonus):
    w, u, k, v = bi_wkv_inputs(1, 6, 8, device=device)
    with torch.no_grad():
        u.fill_(bonus)
    # v - y cancels where a token sees itself alone: what is left, 1e-9 and less, is rounding
    absolute = ('du', 'dk') if bonus > 0 else ()
    check_against_float64(backend, device, torch.float32, (w, u, k, v), absolute=absolute)


@pytest.mark.parametrize('strides', [(4, 0, 1), (12, 5, 1), (3, 12, 1), (24, 8, 2)])
@pytest.mark.parametrize('tokens', [1, 2])
def test_rows_of_any_strides(tokens, strides):
    x = torch.randn(100).as_strided((3, tokens, 4), strides)
    rows = by_rows(x)
    assert torch.equal(rows, x)
    assert rows.stride(0) == rows_between(rows) * rows.stride(1)
    assert rows.stride(2) == 1


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_non_contiguous_inputs(backend, device):
    w, u, k, v = (t.detach() for t in bi_wkv_inputs(2, 18, 6, device=device))
    k_view = k.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    v_view = v[:, :1].expand(-1, 18, -1).requires_grad_()
    y = bi_wkv(w, u, k_view, v_view, backend=backend)
    expected = bi_wkv(w, u, k, v_view.contiguous(), backend='reference')
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    gy = torch.randn(2, 6, 18, device=device).transpose(1, 2)
    (dk,) = torch.autograd.grad(y, k_view, gy)
    leaf = k.requires_grad_()
    (expected_dk,) = torch.autograd.grad(
        bi_wkv(w, u, leaf, v_view.detach(), backend='reference'), leaf, gy
    )
    torch.testing.assert_close(dk, expected_dk, rtol=1e-4, atol=1e-5)


TRITON_DEVICES = [param for param in BACKENDS if param.values[0] == 'triton']


@pytest.mark.parametrize(
    ('tokens', 'decay', 'length', 'blocks', 'group', 'at_once'),
    [
        (37, None, 16, 1, 9, 4),  # one group, which is not asked for
        (37, None, 8, 1, 2, 1),
        (37, None, 8, 2, 3, 2),
        pytest.param(37, None, 4, 3, 9, 3, marks=not_interpreted),
        pytest.param(37, None, 16, 8, 2, 4, marks=not_interpreted),
        # |w| that is too large for sums in registers
        pytest.param(11, 12.0, 4, 1, 9, 4, marks=not_interpreted),
        (11, 12.0, 4, 1, 2, 1),
    ],
)
@pytest.mark.parametrize(('backend', 'device'), TRITON_DEVICES)
def test_every_division_into_lanes_computes_the_definition(
    backend, device, tokens, decay, length, blocks, group, at_once
):
    from linvis_ops.bi_wkv.kernels_triton import bi_wkv_forward
    from linvis_ops.bi_wkv.kernels_triton_backward import bi_wkv_backward as triton_backward
    from linvis_ops.bi_wkv.launch import Launch

    lanes = -(-tokens // (length * blocks))
    launch = Launch(length, blocks, lanes, group, channels=32, warps=1, at_once=at_once)
    batch, channels = (2, 35) if decay is None else (1, 8)
    inputs = bi_wkv_inputs(batch, tokens, channels, device=device, decay=decay, key_scale=1.0)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    y64 = bi_wkv_quadratic(*exact)
    plain = [t.detach().cpu().requires_grad_() for t in inputs]
    y_plain = bi_wkv_quadratic(*plain)
    given = [t.detach() for t in inputs]
    assert_matches('y', bi_wkv_forward(*given, launch).cpu(), y64, y_plain, torch.float32)
    gy = torch.randn(y64.shape)
    result = triton_backward(gy.to(device), *given, launch)
    for name, a, e, p in zip(
        NAMES, result, gradients(y64, exact, gy), gradients(y_plain, plain, gy), strict=True
    ):
        assert_matches(name, a.cpu(), e, p, torch.float32)


@pytest.mark.parametrize('shape', [(1, 1, 1), (128, 196, 192), (1, 65536, 192), (2, 4200, 768)])
@pytest.mark.parametrize('multiprocessors', [20, 132])
@pytest.mark.parametrize('rules', [DEFAULT, *TUNED.values()], ids=['default', *map(str, TUNED)])
def test_division_covers_the_sequence(monkeypatch, rules, multiprocessors, shape):
    monkeypatch.setattr(launch, 'rules_of', lambda _device: (rules, multiprocessors))
    batch, tokens, channels = shape
    for of in ('fwd', 'bwd'):
        division = launch.launch_for(torch.empty(shape, device='meta'), of)
        size = division.length * division.blocks
        assert (division.lanes - 1) * size < tokens <= division.lanes * size
        assert 1 <= division.blocks <= rules[of].most_blocks
        # no multiprocessor is idle that a shorter lane would keep busy
        programs = batch * division.lanes * -(-channels // division.channels)
        assert division.blocks == 1 or programs >= rules[of].programs * multiprocessors
        # every lane asks every group and the lanes of its own group, or all lanes
        groups = -(-division.lanes // division.group)
        asked = groups + division.group if groups > 1 else division.lanes
        assert asked <= 72  # of 65,536 tokens in blocks of 8, else 55


@pytest.mark.parametrize(('backend', 'device'), COMPILED)
def test_repeated_runs_are_bit_identical(backend, device):
    inputs = bi_wkv_inputs(3, 35, 6, device=device)
    runs = []
    for _ in range(2):
        y = bi_wkv(*inputs, backend=backend)
        runs.append((y, *gradients(y, inputs, torch.ones_like(y))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


# Registration


@pytest.mark.parametrize('dtype', [torch.float32, F64], ids=['f32', 'f64'])
def test_opcheck_forward(dtype):
    torch.library.opcheck(bi_wkv_fwd.definition, (*bi_wkv_inputs(2, 18, 4, dtype), 'torch'))


@pytest.mark.parametrize('backend', ON_GPU)
def test_opcheck_on_gpu(backend):
    inputs = bi_wkv_inputs(2, 18, 4, device='cuda')
    torch.library.opcheck(bi_wkv_fwd.definition, (*inputs, backend))
    fixed = tuple(t.detach() for t in inputs)
    torch.library.opcheck(bi_wkv_bwd.definition, (torch.randn_like(fixed[3]), *fixed, backend))


def test_opcheck_forward_strided():
    w, u, k, v = bi_wkv_inputs(2, 4, 18)
    torch.library.opcheck(
        bi_wkv_fwd.definition,
        (w[:4].detach(), u[:4].detach(), k.transpose(1, 2), v.transpose(1, 2), 'torch'),
    )


def test_opcheck_backward():
    inputs = tuple(t.detach() for t in bi_wkv_inputs(2, 18, 4))
    gy = torch.randn(2, 4, 18).transpose(1, 2)
    torch.library.opcheck(bi_wkv_bwd.definition, (gy, *inputs, 'torch'))


def test_compiles_without_graph_breaks_and_without_recompiling_for_a_new_size():
    function = torch.compile(
        lambda w, u, k, v: bi_wkv(w, u, k, v) * 2, fullgraph=True, dynamic=True, backend='aot_eager'
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 10), (3, 17), (4, 33)):
            inputs = bi_wkv_inputs(batch, tokens, 4)
            y = function(*inputs)
            torch.testing.assert_close(y, 2 * bi_wkv(*inputs))
            y.sum().backward()
            assert inputs[0].grad is not None


def test_exports_with_a_dynamic_number_of_tokens():
    class Layer(torch.nn.Module):
        def forward(self, w, u, k, v):
            return bi_wkv(w, u, k, v)

    inputs = tuple(t.detach() for t in bi_wkv_inputs(2, 10, 4))
    tokens = torch.export.Dim('tokens', min=2, max=1024)
    program = torch.export.export(
        Layer(), inputs, dynamic_shapes=(None, None, {1: tokens}, {1: tokens})
    )
    other = tuple(t.detach() for t in bi_wkv_inputs(2, 33, 4))
    torch.testing.assert_close(program.module()(*other), bi_wkv(*other))


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_autocast_does_not_touch_the_arithmetic(backend):
    inputs = bi_wkv_inputs(2, 20, 4)
    expected = bi_wkv(*inputs, backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = bi_wkv(*inputs, backend=backend)
    assert torch.equal(y, expected)


def test_flops_are_counted():
    w, u, k, v = bi_wkv_inputs(2, 10, 4)
    with FlopCounterMode(display=False) as counter:
        bi_wkv(w, u, k, v).sum().backward()
    assert counter.get_total_flops() == (13 + 39) * 2 * 10 * 4


# Bad input


def changed(index, function):
    inputs = [t.detach() for t in bi_wkv_inputs(2, 6, 4)]
    inputs[index] = function(inputs[index])
    return inputs


@pytest.mark.parametrize(
    ('inputs', 'error', 'message'),
    [
        (changed(3, lambda v: v[:, :5]), ValueError, r'got k \(2, 6, 4\), v \(2, 5, 4\)'),
        (changed(2, lambda k: k[0]), ValueError, r'k must be \(B, T, C\), got \(6, 4\)'),
        (changed(2, lambda k: k[:, :0]), ValueError, r'k must not be empty, got \(2, 0, 4\)'),
        (changed(0, lambda w: w[:3]), ValueError, r'w must be \(4,\), got \(3,\)'),
        (changed(1, lambda u: u.bfloat16()), TypeError, r'u must be torch.float32'),
        (changed(2, lambda k: k.half()), TypeError, r'got torch.float16 and torch.float32'),
        (changed(2, lambda k: k.long()), TypeError, r'got torch.int64'),
        (changed(0, lambda w: w.to('meta')), ValueError, r'k is on cpu and w on meta'),
        (changed(3, lambda v: 3.0), TypeError, r'v must be a tensor, got float'),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(inputs, error, message):
    with pytest.raises(error, match=message) as caught:
        bi_wkv(*inputs)
    assert '\n' not in str(caught.value)


def test_unknown_backend_is_refused():
    with pytest.raises(
        BackendUnavailableError,
        match="no backend 'tritn'; choose one of auto, triton, cuda, torch, reference",
    ):
        bi_wkv(*bi_wkv_inputs(1, 3, 2), backend='tritn')


@pytest.mark.skipif(torch.cuda.is_available() or interpreting(), reason='Triton can run here')
def test_unavailable_backend_says_why():
    with pytest.raises(
        BackendUnavailableError, match='triton cannot run, since there is no CUDA device'
    ):
        bi_wkv(*bi_wkv_inputs(1, 3, 2), backend='triton')
