"""Bi-WKV on GPUs: sizes of networks and huge tensors."""

import pytest
import torch

from linvis_ops import bi_wkv
from linvis_ops.bi_wkv.cuda import extension_error
from linvis_ops.bi_wkv.reference import bi_wkv_quadratic
from linvis_ops.testing import FLOORS, assert_matches, bi_wkv_inputs, gradients

NAMES = ('dw', 'du', 'dk', 'dv')
GIB = 2**30

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        'backend',
        [
            'triton',
            pytest.param(
                'cuda',
                marks=pytest.mark.skipif(
                    extension_error() is not None, reason=str(extension_error())
                ),
            ),
        ],
    ),
]
LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 196, 197, 576, 1000, 1024, 4096, 4200, 16384]
WIDTHS = [1, 3, 32, 100, 192, 384, 768, 1024]
# Gradients that are zero: of one token, which sees itself alone, and of two, whose distance is 1.
ROUNDING = {1: ('dw', 'du', 'dk'), 2: ('dw',)}
FURTHER = [
    *((tokens, 192) for tokens in (1, 2, 32, 33, 1000, 4096, 4200, 16384)),
    *((tokens, 1024) for tokens in (196, 4096)),
    (64, 384),
    (4096, 384),
]


def detached(*sizes, dtype=torch.float32, device='cuda'):
    return [t.detach() for t in bi_wkv_inputs(*sizes, dtype, device)]


def chunked(w, u, k, v, gy):
    """y and the gradients by w, u, k, v in plain PyTorch, at linear cost."""
    inputs = [t.detach().requires_grad_() for t in (w, u, k, v)]
    y = bi_wkv(*inputs, backend='torch')
    return y, *gradients(y, inputs, gy)


def decay_gradient_by_definition(w, u, k, v, gy):
    """The gradient by w of the T x T pairs of each channel of each sequence, one after another."""
    dw = torch.zeros_like(w)
    for b in range(v.shape[0]):
        for c in range(v.shape[2]):
            one = [t.detach().requires_grad_() for t in (w[c : c + 1], u[c : c + 1])]
            one += [t[b : b + 1, :, c : c + 1].detach().requires_grad_() for t in (k, v)]
            dw[c] += gradients(bi_wkv_quadratic(*one), one[:1], gy[b : b + 1, :, c : c + 1])[0][0]
    return dw


def check_against_float64(backend, dtype, inputs, factor=2.0, far=False):
    """`far`: far tokens weigh more, where the definition judges the gradient by w."""
    gy = torch.randn_like(inputs[3])
    # in float64 the chunked form equals the definition, by tests of its own
    y64, *exact = chunked(*(t.double() for t in inputs), gy.double())
    y_plain, *expected = chunked(*inputs, gy)
    y = bi_wkv(*inputs, backend=backend)
    assert_matches('y', y, y64, y_plain, dtype)
    if far:
        expected[0] = decay_gradient_by_definition(*inputs, gy)
    for name, a, e, p in zip(NAMES, gradients(y, inputs, gy), exact, expected, strict=True):
        if name in ROUNDING.get(y.shape[1], ()):
            torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=1e-5)
        else:
            short = a.dtype != dtype
            # The gradients by w and u are float32 beside tokens of 16 bits. On a CPU, with plain
            # PyTorch, the Triton kernels and the other CUDA kernels, their errors are 5e-8 to 8e-6;
            # the streaming kernels approximate more.
            floor = 10 * FLOORS[a.dtype] if short else None
            assert_matches(name, a, e, p, a.dtype, 5 * factor if short else factor, floor)


@pytest.mark.parametrize('channels', WIDTHS)
@pytest.mark.parametrize('tokens', LENGTHS)
def test_sizes_of_networks_match_float64(backend, tokens, channels):
    batch = 1 if channels in (1, 768) else 2
    inputs = bi_wkv_inputs(batch, tokens, channels, torch.bfloat16, 'cuda')
    check_against_float64(backend, torch.bfloat16, inputs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['f32', 'f16'])
@pytest.mark.parametrize(('tokens', 'channels'), FURTHER)
def test_other_dtypes_match_float64(backend, tokens, channels, dtype):
    check_against_float64(backend, dtype, bi_wkv_inputs(2, tokens, channels, dtype, 'cuda'))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize('tokens', [196, 1000, 4096, 16384])
@pytest.mark.parametrize('decay', [None, 1.0])
@pytest.mark.parametrize('keys', ['wide', 'equal'])
def test_extreme_inputs_match_float64(backend, keys, decay, tokens, dtype):
    # |w| up to 1 a token, of both signs
    channels = 40 if tokens <= 4096 else 4
    w, u, k, v = bi_wkv_inputs(2, tokens, channels, dtype, 'cuda', decay=decay)
    with torch.no_grad():
        k.uniform_(-80, 80) if keys == 'wide' else k.fill_(-80.0)
    # Where far tokens weigh more, or one by its key, v - y cancels: README.md, Numerics. The
    # chunked form in PyTorch avoids that in the gradient by w, the definition does not: samples of
    # one noise, of which two evaluations of the definition differ by up to 3.2.
    factor = 5.0 if keys == 'wide' or decay else 2.0
    check_against_float64(backend, dtype, (w, u, k, v), factor, far=decay is not None)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize('tokens', [64, 196, 1000])
@pytest.mark.parametrize('part', ['end', 'middle'])
def test_keys_of_minus_infinity_match_float64(backend, part, tokens, dtype):
    w, u, k, v = bi_wkv_inputs(2, tokens, 64, dtype, 'cuda')
    masked = slice(tokens // 3, None if part == 'end' else -(tokens // 4))
    with torch.no_grad():
        k[0, masked] = -torch.inf
        k[1, :, :40] = -torch.inf
        k[1, tokens // 5, :40] = 0.0  # the only token of these channels
    check_against_float64(backend, dtype, (w, u, k, v), 5.0)  # few tokens dominate, as above


def test_longest_sequence_matches_float64(backend):
    inputs = bi_wkv_inputs(1, 2**18, 8, torch.bfloat16, 'cuda')
    check_against_float64(backend, torch.bfloat16, inputs)


@pytest.mark.parametrize('channels', [192, 30])
@pytest.mark.parametrize('tokens', [196, 1000])
def test_nothing_beside_the_inputs_has_an_effect(backend, tokens, channels):
    """The kernel of VRWKV's authors reads beyond 196 tokens."""
    w, u, k, v = (t.detach() for t in bi_wkv_inputs(2, tokens, channels, torch.bfloat16, 'cuda'))
    gy = torch.randn_like(v)

    def both_passes(k, v, gy):
        given = [t.requires_grad_() for t in (w.clone(), u.clone(), k.detach(), v.detach())]
        y = bi_wkv(*given, backend=backend)
        return y, *torch.autograd.grad(y, given, gy)

    def between_nan(x):
        beside = torch.full((x.numel() + 2**15,), torch.nan, dtype=x.dtype, device=x.device)
        return beside[2**14 : -(2**14)].view_as(x).copy_(x)

    expected = both_passes(k, v, gy)
    for a, e in zip(both_passes(*map(between_nan, (k, v, gy))), expected, strict=True):
        assert torch.equal(a, e)


def test_more_elements_than_32_bits_can_count(backend):
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * GIB:
        pytest.skip(f'needs 60 GiB of GPU memory, {free / GIB:.0f} are free')
    w, u, k, v = detached(1, 2**18, 8200, dtype=torch.bfloat16)
    assert k.numel() > 2**31
    given = [t.requires_grad_() for t in (w, u, k, v)]
    # a few channels by themselves, in a tensor that is small
    last = [t[..., -8:].detach().clone().requires_grad_() for t in given]
    y, expected = bi_wkv(*given, backend=backend), bi_wkv(*last, backend=backend)
    torch.testing.assert_close(y[..., -8:], expected, rtol=1e-2, atol=1e-3)
    gy = torch.randn_like(expected)
    g = torch.zeros_like(y)
    g[..., -8:] = gy
    for a, e in zip(gradients(y, given, g), gradients(expected, last, gy), strict=True):
        bound = 1e-2 * e.abs().max().item()
        torch.testing.assert_close(a[..., -8:], e, rtol=1e-2, atol=bound)
