"""Registration of retention, and what it refuses.

Sizes are B, T, H, K, V, in that order; grids are (rows, columns).
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from linvis_ops import (
    BackendUnavailableError,
    available_backends,
    retention,
    retention_with_state,
)
from linvis_ops.retention.op import retention_bwd, retention_fwd
from linvis_ops.testing import gradients, retention_inputs

F64 = torch.float64
directions = pytest.mark.parametrize('direction', ['causal', 'bidirectional'])


def detached(inputs):
    return [t.detach() for t in inputs]


# Registration


@pytest.mark.parametrize('dtype', [torch.float32, F64], ids=['f32', 'f64'])
@pytest.mark.parametrize('columns', [1, 6])
@pytest.mark.parametrize('bidirectional', [False, True])
def test_opcheck_forward(dtype, columns, bidirectional):
    inputs = retention_inputs(2, 19, 3, 4, 5, dtype)
    torch.library.opcheck(retention_fwd.definition, (*inputs, columns, bidirectional, 0.5, 'torch'))


@pytest.mark.parametrize('columns', [1, 6])
@pytest.mark.parametrize('bidirectional', [False, True])
def test_opcheck_strided_with_the_scale_left_out(columns, bidirectional):
    *tokens, log_gamma = detached(retention_inputs(2, 3, 19, 4, 5, torch.bfloat16))
    views = [t.transpose(1, 2) for t in tokens]
    rest = (log_gamma[:3], columns, bidirectional, None, 'torch')
    torch.library.opcheck(retention_fwd.definition, (*views, *rest))
    go = torch.randn(2, 3, 19, 5).bfloat16().transpose(1, 2)
    torch.library.opcheck(retention_bwd.definition, (go, *views, *rest))
    assert [t.dtype for t in retention_bwd(go, *views, *rest)] == [torch.bfloat16] * 3


SCALES = {
    'default': lambda q: None,
    'number': lambda q: 0.5,
    'size': lambda q: q.shape[3] ** -0.5,
}


@pytest.mark.parametrize('scale', SCALES.values(), ids=SCALES)
@pytest.mark.parametrize('grid', [False, True])
def test_compiles_without_graph_breaks_and_without_recompiling_for_a_new_size(scale, grid):
    def layer(q, k, v, log_gamma, rows, columns):
        hw = (rows, columns) if grid else None
        return retention(q, k, v, log_gamma, hw, scale=scale(q)) * 2

    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, dynamic=True, backend='aot_eager')
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, rows, columns in ((2, 3, 4), (3, 5, 6), (4, 7, 2)):
            inputs = retention_inputs(batch, rows * columns + 1, 6, 5, 7)
            y = function(*inputs, rows, columns)
            torch.testing.assert_close(y, layer(*inputs, rows, columns))
            y.sum().backward()
            assert all(t.grad is not None for t in inputs[:3])


@directions
def test_exports_with_a_dynamic_number_of_tokens(direction):
    class Layer(torch.nn.Module):
        def forward(self, *inputs):
            return retention(*inputs, direction=direction)

    tokens = torch.export.Dim('tokens', min=2, max=1024)
    program = torch.export.export(
        Layer(),
        tuple(detached(retention_inputs(2, 10, 3, 4, 5))),
        dynamic_shapes=((*({1: tokens} for _ in range(3)), None),),
    )
    other = detached(retention_inputs(2, 133, 3, 4, 5))
    torch.testing.assert_close(program.module()(*other), Layer()(*other))


@pytest.mark.parametrize('class_token', [0, 1])
def test_exports_with_a_dynamic_grid(class_token):
    class Layer(torch.nn.Module):
        def forward(self, grid, log_gamma):
            x = torch.cat([grid.flatten(1, 2), grid[:, 0, :class_token]], 1)
            return retention(x, x, x, log_gamma, tuple(grid.shape[1:3]))

    sizes = {n: torch.export.Dim(name, min=2, max=64) for n, name in ((1, 'rows'), (2, 'columns'))}
    log_gamma = torch.tensor([-0.1, -0.01])
    given = torch.randn(2, 3, 4, 2, 8), log_gamma
    program = torch.export.export(Layer(), given, dynamic_shapes=(sizes, None))
    other = torch.randn(2, 15, 6, 2, 8), log_gamma
    torch.testing.assert_close(program.module()(*other), Layer()(*other))


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_autocast_does_not_touch_the_arithmetic(backend):
    inputs = retention_inputs(2, 20, 2, 4, 5)
    expected = retention(*inputs, (4, 5), backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = retention(*inputs, (4, 5), backend=backend)
    assert torch.equal(y, expected)


@directions
def test_runs_without_data(direction):
    hw = (4, 5)
    meta = retention(*retention_inputs(2, 21, 3, 4, 5, torch.bfloat16, 'meta'), hw, direction)
    with FakeTensorMode():
        inputs = retention_inputs(2, 21, 3, 4, 5, torch.bfloat16)
        fake = retention(*inputs, hw, direction)
        grads = gradients(fake, inputs[:3], torch.ones_like(fake))
        _, state = retention_with_state(*inputs, hw)
    for y in (meta, fake):
        assert y.shape == (2, 21, 3, 5)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous()
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3
    assert state.shape == (2, 3, 5, 4, 5)


@pytest.mark.parametrize(('hw', 'operations'), [(None, 5 + 12), ((2, 5), 7 + 16)])
@pytest.mark.parametrize(('direction', 'times'), [('causal', 1), ('bidirectional', 2)])
def test_flops_are_counted(hw, operations, direction, times):
    inputs = retention_inputs(2, 10, 3, 4, 5)
    with FlopCounterMode(display=False) as counter:
        retention(*inputs, hw, direction).sum().backward()
    assert counter.get_total_flops() == times * operations * 2 * 10 * 3 * 4 * 5


def test_backends_are_listed():
    reasons = available_backends('retention', *retention_inputs(1, 4, 2, 3, 3))
    assert reasons['torch'] is None
    assert list(reasons)[-1] == 'reference'


# Bad input


def changed(index, function):
    inputs = detached(retention_inputs(2, 6, 3, 4, 5))
    inputs[index] = function(inputs[index])
    return inputs


@pytest.mark.parametrize('function', [retention, retention_with_state])
@pytest.mark.parametrize(
    ('inputs', 'error', 'message'),
    [
        (changed(1, lambda k: k[:, :5]), ValueError, r'got q \(2, 6, 3, 4\), k \(2, 5, 3, 4\)'),
        (changed(2, lambda v: v[:, :5]), ValueError, r'q and v must agree in \(B, T, H\), got q'),
        (changed(2, lambda v: v[0]), ValueError, r'v must be \(B, T, H, V\), got \(6, 3, 5\)'),
        (changed(0, lambda q: q[..., :0]), ValueError, r'q must not be empty, got \(2, 6, 3, 0\)'),
        (changed(1, lambda k: k.half()), TypeError, r'got torch.float32 and torch.float16'),
        (changed(0, lambda q: q.long()), TypeError, r'q must be float32, .* got torch.int64'),
        (changed(2, lambda v: 3.0), TypeError, r'v must be a tensor, got float'),
        (changed(3, lambda g: g[:2]), ValueError, r'log_gamma must be \(3,\), got \(2,\)'),
        (changed(3, lambda g: g.half()), TypeError, r'log_gamma must be torch.float32 beside'),
        (changed(3, lambda g: -0.1), TypeError, r'log_gamma must be a tensor, got float'),
        (changed(3, lambda g: g.to('meta')), ValueError, r'q is on cpu and log_gamma on meta'),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(function, inputs, error, message):
    with pytest.raises(error, match=f'^{function.__name__}: .*{message}') as caught:
        function(*inputs)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('function', [retention, retention_with_state])
@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        ({'hw': (2, 4)}, ValueError, r'hw \(2, 4\) stands for 8 tokens \(9 with a class token\)'),
        ({'hw': (-1, 6)}, ValueError, r'hw must be \(rows, columns\), .* got \(-1, 6\)'),
        ({'hw': (6, 0)}, ValueError, r'hw must be \(rows, columns\), .* got \(6, 0\)'),
        ({'hw': (0, 6)}, ValueError, r'hw .*\(0, 6\)'),
        ({'hw': (2, 3, 1)}, ValueError, r'hw must be .*, got \(2, 3, 1\)'),
        ({'hw': 6}, TypeError, r'hw must be \(rows, columns\) of type int, got 6'),
        ({'direction': 'forward'}, ValueError, r"direction must be .*, got 'forward'"),
        ({'direction': True}, ValueError, r'direction must be .*, got True'),
        ({'scale': torch.ones(())}, TypeError, r'scale must be a number or None, got Tensor'),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)  # fmt: skip
def test_bad_options_are_refused(function, kwargs, error, message):
    with pytest.raises(error, match=f'^{function.__name__}: {message}'):
        function(*retention_inputs(1, 6, 2, 3, 4), **kwargs)


def test_unknown_backend_is_refused():
    with pytest.raises(BackendUnavailableError, match="no backend 'tritn'; choose one of auto, "):
        retention(*retention_inputs(1, 3, 1, 2, 2), backend='tritn')


def test_only_the_tokens_may_be_none():
    q, k, v, log_gamma = detached(retention_inputs(2, 3, 2, 3, 4))
    with pytest.raises(ValueError, match=r'^retention: q must not be empty, got \(2, 0, 2, 3\)'):
        retention(q[:, :0], k[:, :0], v[:, :0], log_gamma)
    with pytest.raises(ValueError, match=r'^retention_with_state: v must not be empty, got'):
        retention_with_state(q[:, :0], k[:, :0], v[:, :0, :, :0], log_gamma)
    with pytest.raises(ValueError, match=r'^retention_with_state: hw \(1, 3\) stands for 3 tokens'):
        retention_with_state(q[:, :0], k[:, :0], v[:, :0], log_gamma, (1, 3))
    with pytest.raises(ValueError, match=r'^retention_with_state: state must be \(2, 2, 3, 4\)'):
        retention_with_state(q[:, :0], k[:, :0], v[:, :0], log_gamma, None, torch.zeros(2))
