"""The registry: complete entries, what they run, least traffic, rivals."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.passes import PASSES, Copies, Function, tokens
from benchmarks.registry import OPERATORS, elements, named
from benchmarks.rivals import (
    FLA_GLA_STACKED,
    FLA_GLA_TWICE,
    FLA_RETENTION,
    FLA_RWKV4_TWICE,
    SDPA,
    UnavailableError,
    imported,
)

ROOT = Path(__file__).resolve().parents[3]
TINY = {
    'bi_wkv': (2, 6, 8),
    'bi_gla': (2, 6, 3, 4, 5),
    'retention': (2, 6, 3, 4, 5),
    'retention_2d_causal': (2, 2, 3, 3, 4, 5),
    'retention_2d_bidirectional': (2, 2, 3, 3, 4, 5),
    'q_shift': (2, 2, 3, 8),
    'q_shift_mix': (2, 2, 3, 8),
    'q_shift_mix_norm': (2, 2, 3, 8),
    'rms_norm': (2, 6, 8),
    'layer_norm': (2, 6, 8),
}
GLA = dict(zip('BTHKV', TINY['bi_gla'], strict=True))  # of retention, too
PRESENT = [pytest.param(o, id=o.name) for o in OPERATORS if not o.missing()]


def prepared(operator, backend='torch', dtype=torch.float32):
    return operator.prepare(operator.shape(TINY[operator.name]), dtype, 'cpu', backend)


def test_harness_needs_nothing_but_the_operators():
    """Of this project; rivals and triton are imported where they run."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / 'ops/benchmarks').glob('*.py')]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split('.')[0] for name in names} - sys.stdlib_module_names
    assert roots == {'benchmarks', 'linvis_ops', 'matplotlib', 'torch', 'triton'}


def test_names_are_unique():
    names = [operator.name for operator in OPERATORS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize('operator', OPERATORS, ids=lambda o: o.name)
def test_entry_is_complete(operator):
    assert {len(sizes) for sizes in operator.shapes} == {len(operator.axes)}
    assert len(set(operator.shapes)) == len(operator.shapes)
    for sizes in operator.shapes:
        shape = operator.shape(sizes)
        assert elements(shape) >= tokens(shape) > 0
    assert all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in operator.dtypes)
    assert 'copy' in [rival.name for rival in operator.rivals]


@pytest.mark.parametrize('operator', PRESENT)
def test_tests_of_an_entry_exist_and_have_gpu_tests(operator):
    texts = [(ROOT / file).read_text() for file in operator.test_files()]
    assert any('pytest.mark.gpu' in text for text in texts)


@pytest.mark.parametrize('operator', PRESENT)
def test_entry_runs_all_passes(operator):
    function = prepared(operator)
    assert function.inputs
    for pass_name in PASSES:
        assert function.call(pass_name).run() is not None


# of layer_norm, 'torch' is PyTorch's own norm
@pytest.mark.parametrize('operator', [p for p in PRESENT if p.values[0].function != 'layer_norm'])
def test_backward_pass_is_one_registered_operator(operator):
    """The operator is called directly, with what autograd gives to it."""
    call = prepared(operator).call('bwd')
    assert call.what.startswith(f'linvis::{operator.function}')
    result = call.run()
    first = result[0] if isinstance(result, (tuple, list)) else result
    assert not first.requires_grad


@pytest.mark.parametrize('backend', ['torch', 'reference'])
@pytest.mark.parametrize('operator', PRESENT)
def test_backward_passes_give_the_gradients(operator, backend):
    """The one that calls an operator, the one by autograd, and that of both passes."""
    function = prepared(operator, backend)
    outputs = function.forward()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(3)
    grads = [torch.randn_like(y) for y in outputs]
    expected = flat(torch.autograd.grad(outputs, function.inputs, grads))
    for pass_name in ('bwd', 'fwd+bwd'):
        torch.manual_seed(3)
        call = function.call(pass_name)
        torch.testing.assert_close(flat(call.run()), expected)
        torch.testing.assert_close(flat(call.run()), expected)
        if backend == 'reference':
            assert call.what == 'autograd'


def flat(result):
    tensors = result if isinstance(result, (tuple, list)) else [result]
    return torch.cat([t.flatten() for t in tensors])


def test_forward_pass_records_no_gradients():
    (operator,) = named(['bi_wkv'])
    assert not prepared(operator).call('fwd').run().requires_grad


def test_views_do_not_hide_the_operator():
    (operator,) = named(['q_shift'])
    function = prepared(operator)
    viewed = Function(lambda: function.forward().transpose(1, 2), function.inputs)
    assert viewed.call('bwd').what == 'linvis::q_shift'


def test_arithmetic_beside_the_operator_is_timed_with_it():
    (operator,) = named(['q_shift'])
    function = prepared(operator)
    doubled = Function(lambda: 2 * function.forward(), function.inputs)
    assert doubled.call('bwd').what == 'autograd'


def test_unknown_pass_is_refused():
    with pytest.raises(ValueError, match="there is no pass 'forward'; there are fwd, bwd, fwd"):
        prepared(named(['q_shift'])[0]).call('forward')


@pytest.mark.parametrize(
    ('name', 'sizes', 'dtype', 'forward', 'backward'),
    [
        # 6 and 10 bytes an element in bfloat16, twice that in float32
        ('bi_wkv', (128, 196, 192), 'bfloat16', 28_901_376, 48_168_960),
        ('bi_wkv', (16, 4096, 192), 'bfloat16', 75_497_472, 125_829_120),
        ('bi_wkv', (16, 4096, 192), 'float32', 150_994_944, 251_658_240),
        # 512 and 896 bytes a token and head
        ('bi_gla', (128, 196, 3, 32, 64), 'bfloat16', 38_535_168, 67_436_544),
        ('bi_gla', (2, 16640, 4, 16, 32), 'float32', 68_157_440, 119_275_520),
        # 512 and 896
        ('retention', (128, 197, 6, 64, 64), 'bfloat16', 77_463_552, 135_561_216),
        ('retention_2d_causal', (4, 128, 128, 6, 64, 64), 'bfloat16', 201_326_592, 352_321_536),
        # 4 and 4
        ('q_shift', (128, 14, 14, 192), 'bfloat16', 19_267_584, 19_267_584),
        # 8 and 10
        ('q_shift_mix', (128, 14, 14, 192), 'bfloat16', 38_535_168, 48_168_960),
    ],
)
def test_least_traffic(name, sizes, dtype, forward, backward):
    (operator,) = named([name])
    traffic = operator.bytes_by_pass(operator.shape(sizes), getattr(torch, dtype))
    assert traffic == {'fwd': forward, 'bwd': backward, 'fwd+bwd': forward + backward}


@pytest.mark.parametrize('operator', PRESENT)
def test_least_traffic_is_that_of_the_tensors(operator):
    """Inputs read once, outputs written once; parameters (C,) are too small to count."""
    shape = operator.shape(TINY[operator.name])
    inputs = operator.inputs(shape, torch.bfloat16, 'cpu')
    outputs = operator.prepare(shape, torch.bfloat16, 'cpu', 'torch').call('fwd').run()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    moved = sum(t.nbytes for t in (*inputs, *outputs) if t.dim() >= 3)
    assert operator.bytes_by_pass(shape, torch.bfloat16)['fwd'] == moved


def test_tokens_and_elements_of_grids_and_heads():
    assert tokens({'B': 2, 'rows': 3, 'columns': 5, 'C': 7}) == 15
    assert elements({'B': 2, 'rows': 3, 'columns': 5, 'C': 7}) == 210
    assert elements({'B': 2, 'T': 4, 'H': 3, 'K': 5, 'V': 6}) == 144


def test_operators_by_name():
    assert [o.name for o in named(['q_shift', 'bi_wkv'])] == ['bi_wkv', 'q_shift']
    assert named([]) == list(OPERATORS)
    with pytest.raises(ValueError, match="there is no operator 'wkv'; there are bi_wkv"):
        named(['wkv'])


def test_operator_that_is_not_there_says_so(monkeypatch):
    monkeypatch.delattr('linvis_ops.q_shift')
    assert named(['q_shift'])[0].missing() == 'linvis_ops has no operator q_shift'


def test_copy_moves_the_bytes_of_the_pass():
    call = Copies({'fwd': 10, 'bwd': 20}, 'cpu').call('bwd')
    target = call.run()
    assert target.nbytes == 10  # as many are read
    assert target.any()


def test_softmax_attention_runs_on_as_many_tokens():
    by_name = {rival.name: rival for rival in SDPA}
    shape = {'B': 2, 'T': 5, 'C': 128}
    attention = by_name['sdpa_flash'].prepare(shape, torch.bfloat16, 'cpu', {})
    assert attention.call('fwd').run().shape == (2, 2, 5, 64)
    assert [g.shape for g in attention.call('bwd').run()] == [(2, 5, 2, 64)] * 3
    of_heads = by_name['sdpa_flash'].prepare({**GLA, 'V': 64}, torch.bfloat16, 'cpu', {})
    assert of_heads.call('fwd').run().shape == (2, 3, 6, 64)


@pytest.mark.parametrize(
    ('channels', 'dtype', 'reason'),
    [(128, torch.float32, 'float16 and bfloat16, not torch.float32'), (96, torch.float16, '96 ch')],
)
def test_softmax_attention_says_what_it_cannot_run(channels, dtype, reason):
    with pytest.raises(UnavailableError, match=reason):
        SDPA[0].prepare({'B': 2, 'T': 5, 'C': channels}, dtype, 'cpu', {})


def test_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'fla', None)
    with pytest.raises(UnavailableError, match='fla-core cannot be used'):
        FLA_RWKV4_TWICE.prepare({'B': 1, 'T': 2, 'C': 3}, torch.float32, 'cpu', {})
    for rival in (FLA_GLA_TWICE, FLA_GLA_STACKED, FLA_RETENTION):
        with pytest.raises(UnavailableError, match='fla-core cannot be used'):
            rival.prepare(GLA, torch.float32, 'cpu', {})
    with pytest.raises(UnavailableError, match='mathematics cannot be used'):
        imported('math', 'mathematics', 'squareroot')


def test_fla_runs_once_each_way(monkeypatch):
    calls = []

    def wkv(w, u, k, v, state):
        calls.append(k)
        return k + v + w + u, state

    monkeypatch.setattr('benchmarks.rivals.imported', lambda *_: wkv)
    function = FLA_RWKV4_TWICE.prepare({'B': 1, 'T': 2, 'C': 3}, torch.float32, 'cpu', {})
    assert function.call('fwd').run().shape == (1, 2, 3)
    torch.testing.assert_close(calls[1], calls[0].flip(1))
    assert len(function.call('fwd+bwd').run()) == 4


def causal(q, k, v, g):
    """What fla-core computes, token by token, for log gates g."""
    state, outputs = 0, []
    for t in range(q.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum('bhk,bhkv->bhv', q[:, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), None


@pytest.mark.parametrize('rival', [FLA_GLA_TWICE, FLA_GLA_STACKED], ids=lambda rival: rival.name)
def test_both_directions_of_fla_are_the_operator(monkeypatch, rival):
    monkeypatch.setattr('benchmarks.rivals.imported', lambda *_: causal)
    function = rival.prepare(GLA, torch.float32, 'cpu', {})
    (operator,) = named(['bi_gla'])
    expected = operator.prepare(GLA, torch.float32, 'cpu', 'reference')
    for pass_name in ('fwd', 'fwd+bwd'):
        torch.manual_seed(3)
        actual = flat(function.call(pass_name).run())
        torch.manual_seed(3)
        torch.testing.assert_close(actual, flat(expected.call(pass_name).run()))


def test_retention_of_fla_is_the_operator_but_for_its_decays(monkeypatch):
    (operator,) = named(['retention'])
    *_, log_gamma = operator.inputs(GLA, torch.float32, 'cpu')

    def retention(q, k, v):
        return causal(q, k, v, log_gamma[:, None].expand(q.shape))

    monkeypatch.setattr('benchmarks.rivals.imported', lambda *_: retention)
    function = FLA_RETENTION.prepare(GLA, torch.float32, 'cpu', {})
    expected = operator.prepare(GLA, torch.float32, 'cpu', 'reference')
    for pass_name in ('fwd', 'fwd+bwd'):
        torch.manual_seed(3)
        actual = flat(function.call(pass_name).run())
        torch.manual_seed(3)
        torch.testing.assert_close(actual, flat(expected.call(pass_name).run()))
