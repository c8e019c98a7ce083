"""Choice of backends and what users are told of it."""

import logging
from types import SimpleNamespace

import pytest
import torch

from linvis_ops import (
    BackendUnavailableError,
    _dispatch,
    _triton,
    available_backends,
    bi_wkv,
    operators,
)
from linvis_ops._library import custom_op
from linvis_ops.testing import bi_wkv_inputs


@pytest.fixture
def toy(monkeypatch):
    """An operator with a backend that never runs and two that do."""
    monkeypatch.setattr(_dispatch, '_BACKENDS', {})
    _dispatch._say_once.cache_clear()

    def can(*_tensors):
        return None

    _dispatch.register_backends(
        'toy',
        [
            _dispatch.Backend('never', lambda *_: 'it is a toy', lambda: 0, lambda: 0),
            _dispatch.Backend('first', can, lambda: 1, lambda: 1),
            _dispatch.Backend('second', can, lambda: 2, lambda: 2),
        ],
    )


def test_auto_takes_the_first_that_can_run_and_logs_why_others_cannot_once(toy, caplog):
    with caplog.at_level(logging.DEBUG, 'linvis_ops._dispatch'):
        assert _dispatch.select('toy', 'auto', torch.zeros(1)).name == 'first'
        _dispatch.select('toy', 'auto', torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == [
        'toy runs on backend first: never cannot run, since it is a toy.'
    ]


def test_a_named_backend_is_taken(toy):
    assert _dispatch.select('toy', 'second', torch.zeros(1)).name == 'second'


def test_a_named_backend_that_cannot_run_says_why(toy):
    with pytest.raises(BackendUnavailableError, match='never cannot run, since it is a toy'):
        _dispatch.select('toy', 'never', torch.zeros(1))


@pytest.mark.parametrize(
    ('unavailable', 'leads', 'expected'),
    [(None, True, 'leader'), (None, False, 'first'), ('it is a toy', True, 'first')],
)
def test_a_backend_may_lead(toy, caplog, unavailable, leads, expected):
    seen = []

    def leading(*tensors):
        seen.append(tensors)
        return leads

    leader = _dispatch.Backend(
        'leader', lambda *_: unavailable, lambda: 3, lambda: 3, leads=leading
    )
    _dispatch.register_backends('led', [*_dispatch._BACKENDS['toy'][1:], leader])
    x = torch.zeros(1)
    with caplog.at_level(logging.DEBUG, 'linvis_ops._dispatch'):
        assert _dispatch.select('led', 'auto', x).name == expected
    # one that cannot run is not asked
    assert seen == ([] if unavailable else [(x,)])
    assert not caplog.records
    # a name is a name
    assert _dispatch.select('led', 'second', x).name == 'second'
    assert _dispatch.default_backend('led') == 'first'


@pytest.mark.parametrize('forward', [True, False])
@pytest.mark.parametrize('backward', [True, False])
def test_bi_wkv_asks_for_a_leader_in_each_pass(monkeypatch, forward, backward):
    ran = []

    def backend(name, **kwargs):
        def run_forward(*inputs):
            ran.append(f'{name} forward')
            return torch.empty_like(inputs[-1])

        def run_backward(_gy, *inputs):
            ran.append(f'{name} backward')
            return tuple(torch.empty_like(x) for x in inputs)

        return _dispatch.Backend(name, lambda *_: None, run_forward, run_backward, **kwargs)

    def leads(_k, _v, _w, _u, gy=None):
        return forward if gy is None else backward

    backends = (backend('triton'), backend('cuda', leads=leads))
    monkeypatch.setitem(_dispatch._BACKENDS, 'bi_wkv', backends)
    monkeypatch.delenv('LINVIS_OPS_BACKEND', raising=False)
    bi_wkv(*bi_wkv_inputs(1, 4, 2)).sum().backward()
    first, second = ('cuda' if leads else 'triton' for leads in (forward, backward))
    assert ran == [f'{first} forward', f'{second} backward']
    ran.clear()
    bi_wkv(*bi_wkv_inputs(1, 4, 2), backend='cuda').sum().backward()
    assert ran == ['cuda forward', 'cuda backward']


def test_environment_overrides_auto_only(monkeypatch):
    inputs = bi_wkv_inputs(1, 4, 2)
    monkeypatch.setenv('LINVIS_OPS_BACKEND', '')  # as shells unset a variable
    assert _dispatch.requested_backend('bi_wkv', 'auto') == 'auto'
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'nonsense')
    with pytest.raises(BackendUnavailableError, match="there is no backend 'nonsense'"):
        bi_wkv(*inputs)
    bi_wkv(*inputs, backend='torch')
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'reference')
    y = bi_wkv(*inputs)
    assert y.grad_fn.name() != bi_wkv(*inputs, backend='torch').grad_fn.name()


def test_environment_is_for_the_operators_that_have_the_backend(toy, monkeypatch):
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'second')
    assert _dispatch.requested_backend('toy', 'auto') == 'second'
    _dispatch.register_backends('another', [])
    assert _dispatch.requested_backend('another', 'auto') == 'auto'


def test_variable_that_asks_for_a_backend_is_named_where_that_cannot_run(toy, monkeypatch):
    reason = 'toy: never cannot run, since it is a toy.'
    for variable in ('', 'auto', 'second'):
        monkeypatch.setenv('LINVIS_OPS_BACKEND', variable)
        with pytest.raises(BackendUnavailableError) as raised:
            _dispatch.select('toy', 'never', torch.zeros(1))
        assert str(raised.value) == reason
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'never')
    chosen = _dispatch.requested_backend('toy', 'auto')
    for choose in (
        lambda: _dispatch.select('toy', chosen, torch.zeros(1)),
        lambda: _dispatch.default_backend('toy'),
    ):
        with pytest.raises(BackendUnavailableError) as raised:
            choose()
        assert str(raised.value) == f'LINVIS_OPS_BACKEND=never: {reason}'


def test_available_backends_gives_reasons():
    assert {'bi_wkv', 'q_shift'} <= set(operators())
    reasons = available_backends('bi_wkv', *bi_wkv_inputs(1, 4, 2, torch.float64))
    assert list(reasons) == ['triton', 'cuda', 'torch', 'reference']
    assert reasons['torch'] is None
    assert isinstance(reasons['triton'], str)


def test_available_backends_of_an_unknown_operator():
    with pytest.raises(ValueError, match="there is no operator 'wkv'; there are bi_gla, bi_wkv, "):
        available_backends('wkv')


def test_an_operator_is_defined_once():
    with pytest.raises(RuntimeError, match='linvis::bi_wkv_fwd is defined already'):
        custom_op('bi_wkv_fwd')(lambda: None)


def test_triton_that_cannot_start_is_a_reason_not_a_traceback(monkeypatch):
    triton = pytest.importorskip('triton')

    class NoCompiler:
        def get_current_device(self):
            raise RuntimeError('Failed to find C compiler.\nPlease specify it.')

    _triton._start_error.cache_clear()
    monkeypatch.setattr(triton.runtime.driver, '_active', NoCompiler())
    assert _triton._start_error() == (
        'triton cannot start (Failed to find C compiler.); '
        'it needs gcc or clang and the headers of Python'
    )
    _triton._start_error.cache_clear()


def on_gpu(number):
    """As much of a tensor on a GPU as the choice of a device looks at."""
    return SimpleNamespace(
        is_cuda=True, get_device=lambda: number, device=torch.device('cuda', number)
    )


def test_inputs_that_triton_cannot_take(monkeypatch):
    pytest.importorskip('triton')
    monkeypatch.setattr(_triton, 'interpreting', lambda: False)
    monkeypatch.setattr(_triton, '_start_error', lambda: None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert _triton.triton_unavailable() == 'there is no CUDA device'
    assert _triton.triton_unavailable(torch.zeros(1)) == 'there is no CUDA device'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert _triton.triton_unavailable() is None
    assert _triton.triton_unavailable(on_gpu(0), on_gpu(0)) is None
    for tensors in ((torch.zeros(1),), (on_gpu(0), torch.zeros(1)), (torch.zeros(1), on_gpu(0))):
        assert _triton.triton_unavailable(*tensors) == 'the inputs are on cpu'


def test_kernels_launch_on_the_device_of_their_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    other = _triton.on_device(on_gpu(2))
    assert isinstance(other, torch.cuda.device)
    assert other.idx == 2
    # nothing is switched where they are
    for tensor in (on_gpu(1), torch.zeros(1)):
        assert not isinstance(_triton.on_device(tensor), torch.cuda.device)
