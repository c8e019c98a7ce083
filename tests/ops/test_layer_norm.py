"""The norm over channels: definition, backends, registration, bad input."""

import pytest
import torch
import torch.nn.functional as F

from linvis_ops import BackendUnavailableError, available_backends, layer_norm
from linvis_ops._triton import interpreting
from linvis_ops.layer_norm.op import layer_norm_bwd, layer_norm_fwd
from linvis_ops.testing import assert_matches, gradients

F64 = torch.float64
DTYPES = {'f32': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}
NAMES = ('dx', 'dweight', 'dbias')
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
CENTRED = pytest.mark.parametrize('centred', [True, False], ids=['layer', 'rms'])
SHAPES = [(1, 4), (3, 3), (2, 5, 16), (33, 32), (2, 3, 4, 32), (7, 96), (300, 40), (5, 192)]


def inputs(shape, dtype=torch.float32, device='cpu', *, bias=True, offset=0.5):
    """x, weight and bias, which require gradients."""
    wide = F64 if dtype == F64 else torch.float32
    x = (torch.randn(shape, dtype=wide) + offset).to(dtype)
    weights = [1 + torch.rand(shape[-1], dtype=wide), torch.randn(shape[-1], dtype=wide)]
    return [t.to(device).requires_grad_() for t in (x, *weights[: 1 + bias])]


def both_passes(tensors, gy, **kwargs):
    y = layer_norm(*tensors, **kwargs)  # without a bias if there are two tensors
    return y.detach(), *gradients(y, tensors, gy)


# Definition


def test_definition_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    weight, bias = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])
    y = layer_norm(x, weight, bias, 1 / 3, backend='reference')  # the variance is 2 / 3
    torch.testing.assert_close(y, torch.tensor([[-1.0, 1, 1], [0, 1, 0]]))
    y = layer_norm(x[1:], weight, None, 9.0, False, backend='reference')
    torch.testing.assert_close(y, torch.tensor([[0.8, 1.6, 0.8]]))


@CENTRED
def test_definition_is_that_of_pytorch(centred):
    x, weight, bias = inputs((4, 5, 7), F64)
    y = layer_norm(x, weight, bias, 1e-3, centred, backend='reference')
    if centred:
        expected = F.layer_norm(x, (7,), weight, bias, 1e-3)
    else:
        expected = F.rms_norm(x, (7,), weight, 1e-3) + bias
    torch.testing.assert_close(y, expected)


@CENTRED
@pytest.mark.parametrize('backend', ['reference', 'torch'])
@pytest.mark.parametrize('bias', [False, True])
def test_right_derivatives(backend, bias, centred):
    tensors = inputs((2, 3, 5), F64, bias=bias)

    def function(*tensors):
        return layer_norm(*tensors, eps=1e-3, centred=centred, backend=backend)

    assert torch.autograd.gradcheck(function, tensors)
    if backend == 'reference':
        assert torch.autograd.gradgradcheck(function, tensors)


# Backends


def check_against_float64(backend, tensors, **kwargs):
    """Of both passes; returns them."""
    x = tensors[0]
    gy = torch.randn(x.shape).to(x)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    reference, plain, result = (
        both_passes(t, gy, backend=b, **kwargs)
        for t, b in ((exact, 'reference'), (tensors, 'reference'), (tensors, backend))
    )
    names = ('y', *NAMES)[: 1 + len(tensors)]
    for name, a, p, e in zip(names, result, plain, reference, strict=True):
        assert a.is_contiguous()
        # those by weight and bias are of their own dtype, float32 beside tokens of 16 bits too
        assert_matches(name, a, e, p, a.dtype)
    assert result[0].dtype == result[1].dtype == x.dtype
    again = both_passes(tensors, gy, backend=backend, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))


@CENTRED
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_matches_float64(backend, device, shape, dtype, centred):
    check_against_float64(backend, inputs(shape, dtype, device), centred=centred, eps=0.1)


@CENTRED
@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_without_a_bias(backend, device, centred):
    check_against_float64(backend, inputs((7, 40), device=device, bias=False), centred=centred)


@pytest.mark.parametrize(('backend', 'device'), BACKENDS[1:])
def test_programs_with_several_tiles(backend, device, monkeypatch):
    from linvis_ops.layer_norm import kernels_triton

    monkeypatch.setattr(kernels_triton, 'BACKWARD_PROGRAMS', 2)
    check_against_float64(backend, inputs((150, 40), device=device))


@pytest.mark.parametrize(
    ('shape', 'dtype'),
    [
        ((20_000, 96), torch.bfloat16),
        ((3, 3136, 32), torch.float32),
        ((10, 1000), torch.float16),
        ((3, 8192), torch.float32),
    ],
    ids=str,
)
@pytest.mark.gpu
def test_matches_float64_at_real_sizes(shape, dtype):
    check_against_float64('triton', inputs(shape, dtype, 'cuda'))


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_far_from_zero(backend, device):
    """A variance from mean squares would lose its digits."""
    tensors = inputs((5, 64), device=device, offset=1000.0)
    gy = torch.randn(5, 64, device=device)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    reference, result = (
        both_passes(t, gy, backend=b) for t, b in ((exact, 'reference'), (tensors, backend))
    )
    for a, e in zip(result, reference, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(('backend', 'device'), [*BACKENDS, ('reference', 'cpu')])
def test_result_of_another_dtype_is_rounded_once(backend, device):
    tensors = inputs((6, 16), device=device)
    y = layer_norm(*tensors, dtype=torch.bfloat16, backend=backend)
    assert y.dtype == torch.bfloat16
    full = layer_norm(*tensors, backend=backend)
    torch.testing.assert_close(y, full.to(torch.bfloat16))
    y.backward(torch.randn_like(y))
    assert [t.grad.dtype for t in tensors] == [torch.float32] * 3


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_weights_of_low_precision_get_gradients_of_theirs(backend, device):
    x, weight, bias = inputs((6, 16), torch.bfloat16, device)
    weights = [t.detach().bfloat16().requires_grad_() for t in (weight, bias)]
    y = layer_norm(x, *weights, backend=backend)
    y.sum().backward()
    assert [t.grad.dtype for t in (x, *weights)] == [torch.bfloat16] * 3
    torch.testing.assert_close(weights[1].grad, torch.full_like(weights[1], 6))


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_takes_tensors_that_are_not_contiguous(backend, device):
    x, weight, bias = (t.detach() for t in inputs((6, 5, 32), device=device))
    view = x.transpose(0, 1)[:, ::2, :16]
    weight, bias = weight[::2], bias[::2]
    y = layer_norm(view, weight, bias, backend=backend)
    expected = layer_norm(view.contiguous(), weight, bias, backend='reference')
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
@pytest.mark.parametrize('channels', [1, 8])
def test_equal_channels_give_the_bias(backend, device, channels):
    x = torch.full((3, channels), 7.0, device=device).requires_grad_()
    _, weight, bias = (t.detach() for t in inputs((3, channels), device=device))
    y = layer_norm(x, weight, bias, backend=backend)
    torch.testing.assert_close(y, bias.expand(3, channels))
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert channels > 1 or not x.grad.any()


@pytest.mark.parametrize(('backend', 'device'), BACKENDS)
def test_no_tokens_are_normalised_to_none(backend, device):
    tensors = inputs((0, 16), device=device)
    y = layer_norm(*tensors, backend=backend)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert not tensors[1].grad.any()


def test_pytorch_s_own_norm_has_all_derivatives():
    tensors = inputs((2, 3, 5), F64)
    assert torch.autograd.gradgradcheck(lambda *t: layer_norm(*t, eps=1e-3), tensors)
    x, weight, bias = (t.detach() for t in tensors)
    _, tangent = torch.func.jvp(lambda x: layer_norm(x, weight, bias), (x,), (x,))
    _, expected = torch.func.jvp(lambda x: F.layer_norm(x, (5,), weight, bias, 1e-6), (x,), (x,))
    torch.testing.assert_close(tangent, expected)


def test_on_the_meta_device():
    tensors = [t.to('meta') for t in inputs((2, 3, 5))]
    for backend in ('auto', 'reference'):
        assert layer_norm(*tensors, dtype=torch.bfloat16, backend=backend).dtype == torch.bfloat16


def test_exports_without_regions_of_autocast():
    class Norm(torch.nn.Module):
        def forward(self, *tensors):
            return layer_norm(*tensors)

    exported = torch.export.export(Norm(), tuple(t.detach() for t in inputs((2, 3, 5))))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert 'aten.layer_norm.default' in targets
    assert not any('autocast' in target for target in targets)


def test_autocast_does_not_touch_the_arithmetic():
    tensors = [t.detach() for t in inputs((6, 16), torch.bfloat16)]
    for backend in ('torch', 'reference'):
        expected = layer_norm(*tensors, backend=backend)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = layer_norm(*tensors, backend=backend)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)


# Registration


@CENTRED
def test_gradient_by_the_formula(centred):
    x, weight, _ = tensors = inputs((4, 3, 7), F64)
    gy = torch.randn(4, 3, 7, dtype=F64)
    _, *expected = both_passes(tensors, gy, eps=0.1, centred=centred, backend='reference')
    actual = layer_norm_bwd(gy, x.detach(), weight.detach(), 0.1, centred, 'torch')
    torch.testing.assert_close(actual, tuple(expected))


@CENTRED
def test_operators_are_registered_right(centred):
    x, weight, bias = inputs((2, 3, 8))
    arguments = (x, weight, bias, 1e-6, centred, torch.bfloat16, 'torch')
    torch.library.opcheck(layer_norm_fwd.definition, arguments)
    given = (torch.randn(2, 3, 8), x.detach(), weight.detach(), 1e-6, centred, 'torch')
    torch.library.opcheck(layer_norm_bwd.definition, given)


def test_compiles_without_recompiling_for_a_new_size():
    compiled = torch.compile(
        lambda *t: 2 * layer_norm(*t), backend='aot_eager', fullgraph=True, dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (4, 7, 20):
            tensors = inputs((2, tokens, 8))
            torch.testing.assert_close(compiled(*tensors), 2 * layer_norm(*tensors))


# Bad input


@pytest.mark.parametrize(
    ('changed', 'error', 'message'),
    [
        ({'x': torch.ones(2, 0)}, ValueError, r'with channels, got \(2, 0\)'),
        ({'x': torch.tensor(1.0)}, ValueError, r'x must be \(\.\.\., C\)'),
        ({'x': torch.ones(2, 8, dtype=torch.int32)}, TypeError, r'x must be float32.*int32'),
        ({'x': [1.0]}, TypeError, 'x must be a tensor, got list'),
        ({'weight': torch.ones(7)}, ValueError, r'weight must be \(8,\), got \(7,\)'),
        ({'bias': torch.ones(1, 8)}, ValueError, r'bias must be \(8,\), got \(1, 8\)'),
        ({'bias': torch.ones(8, device='meta')}, ValueError, 'one device'),
        ({'eps': '1e-6'}, TypeError, "eps must be a number from 0 on, got '1e-6'"),
        ({'eps': -1.0}, TypeError, 'eps must be a number from 0 on, got -1.0'),
        ({'centred': 'no'}, TypeError, "centred must be True or False, got 'no'"),
        ({'dtype': 'bf16'}, TypeError, "dtype must be float32, .* or None, got 'bf16'"),
        ({'dtype': torch.int8}, TypeError, 'dtype must be float32, .* or None, got torch.int8'),
        ({'dtype': torch.float8_e5m2}, TypeError, 'dtype must be float32, .* or None, got torch'),
        ({'backend': 'cuda'}, BackendUnavailableError, "no backend 'cuda'"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    given = {'x': torch.ones(2, 8), 'weight': torch.ones(8), 'bias': torch.ones(8)} | changed
    with pytest.raises(error, match=message):
        layer_norm(**given)


@pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1')
def test_kernels_say_what_they_do_not_take():
    reason = available_backends('layer_norm', torch.ones(2, 9000), torch.ones(9000))['triton']
    assert reason == 'its kernels take up to 8192 channels, not 9000'
    reason = available_backends('layer_norm', torch.ones(2, 4, dtype=F64))['triton']
    assert 'float64' in reason
