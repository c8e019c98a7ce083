"""What every operator with GPU kernels can do there: graphs, streams, devices, compilation."""

from functools import partial

import pytest
import torch

from linvis_ops import (
    available_backends,
    bi_gla,
    bi_wkv,
    layer_norm,
    q_shift,
    q_shift_mix,
    retention,
)
from linvis_ops.testing import bi_gla_inputs, bi_wkv_inputs, gradients, retention_inputs

BF16 = torch.bfloat16


def tokens_of(batch, tokens, device):
    return (torch.randn(batch, tokens, 64, dtype=BF16, device=device).requires_grad_(),)


def mix_inputs(batch, tokens, device):
    mus = [torch.rand(64, device=device).requires_grad_() for _ in range(2)]
    return *tokens_of(batch, tokens, device), *mus


def shifted(x, *, backend):
    return q_shift(x, (x.shape[1] // 10, 10), backend=backend)


def mixes(x, *mus, backend):
    return torch.cat(q_shift_mix(x, (x.shape[1] // 10, 10), mus, backend=backend), -1)


def norm_inputs(batch, tokens, device):
    weights = [torch.rand(64, device=device).requires_grad_() for _ in range(2)]
    return *tokens_of(batch, tokens, device), *weights


def retention_inputs_of(batch, tokens, device):
    return retention_inputs(batch, tokens, 3, 64, 64, BF16, device)


def retention_2d(*tensors, backend):
    hw = (tensors[0].shape[1] // 10, 10)
    return retention(*tensors, hw, 'bidirectional', backend=backend)


# By name: the operator that is asked for its backends, a function of tensors, and the tensors for
# B and T, a multiple of 10.
OPERATORS = {
    'bi_wkv': ('bi_wkv', bi_wkv, lambda b, t, device: bi_wkv_inputs(b, t, 64, BF16, device)),
    'bi_gla': ('bi_gla', bi_gla, lambda b, t, device: bi_gla_inputs(b, t, 3, 32, 64, BF16, device)),
    'layer_norm': ('layer_norm', layer_norm, norm_inputs),
    'q_shift': ('q_shift', shifted, tokens_of),
    'q_shift_mix': ('q_shift_mix', mixes, mix_inputs),
    'retention': ('retention', retention, retention_inputs_of),
    'retention-2d': ('retention', retention_2d, retention_inputs_of),
    # larger than one tile
    'retention-2d-tiles': (
        'retention',
        retention_2d,
        lambda b, t, device: retention_inputs_of(b, 30 * t, device),
    ),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        ('name', 'backend'),
        [*((name, 'triton') for name in OPERATORS), ('bi_wkv', 'cuda'), ('bi_wkv', 'auto')],
    ),
]


@pytest.fixture
def function(name, backend):
    operator, function, _ = OPERATORS[name]
    reason = available_backends(operator).get(backend)  # none of 'auto'
    if reason:
        pytest.skip(reason)
    return partial(function, backend=backend)


def inputs_of(name, batch, tokens, device='cuda'):
    return OPERATORS[name][2](batch, tokens, device)


def both_passes(function, inputs):
    inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    y = function(*inputs)
    gy = torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view_as(y)
    return y.detach(), *gradients(y, [t for t in inputs if t.requires_grad], gy)


@pytest.mark.parametrize('tokens', [50, 600])
def test_in_a_cuda_graph_and_on_a_side_stream(name, function, tokens):
    inputs = inputs_of(name, 2, tokens)
    expected = both_passes(function, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = both_passes(function, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(function, inputs)
    graph.replay()
    for a, b, e in zip(on_side, captured, expected, strict=True):
        assert torch.equal(a, e)
        assert torch.equal(b, e)
    with torch.no_grad():
        for given in inputs:
            given.mul_(0.5)
    graph.replay()  # on other numbers in the same memory
    for a, e in zip(captured, both_passes(function, inputs), strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_on_the_second_gpu_while_the_first_is_the_current_one(name, function):
    there = inputs_of(name, 2, 300, 'cuda:1')
    assert torch.cuda.current_device() == 0
    results = both_passes(function, there)
    assert results[0].device == torch.device('cuda:1')
    here = [t.detach().to('cuda:0').requires_grad_(t.requires_grad) for t in there]
    expected = both_passes(function, here)
    for a, e in zip(results, expected, strict=True):
        assert torch.equal(a.cpu(), e.cpu())


def test_compiles_without_recompiling_for_a_new_size(name, function):
    torch.compiler.reset()  # what was compiled before has another backend
    compiled = torch.compile(lambda *x: function(*x) * 2, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 20), (3, 300), (4, 40)):
            inputs = inputs_of(name, batch, tokens)
            y = compiled(*inputs)
            torch.testing.assert_close(y, 2 * function(*inputs))
            y.sum().backward()
            assert inputs[0].grad is not None


@pytest.mark.parametrize('tokens', [20, 600])
def test_autocast_does_not_touch_the_arithmetic(name, function, tokens):
    inputs = inputs_of(name, 2, tokens)
    expected = both_passes(function, inputs)
    with torch.autocast('cuda', dtype=torch.float16):
        results = both_passes(function, inputs)
    for a, e in zip(results, expected, strict=True):
        assert torch.equal(a, e)
