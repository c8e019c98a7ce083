"""From a selection to rows: layout, figures, what is left out; statistics; the CUDA timer."""

import json
from unittest import mock

import pytest
import torch

from benchmarks import results
from benchmarks.measure import Measurement, Selection
from benchmarks.registry import named
from benchmarks.timing import CudaTimer, Timing


def measured(timer, **fields):
    """Rows and what was left out of bi_wkv at a tiny shape, beside a copy of 1000 GB/s."""
    known = {'operators': named(['bi_wkv']), 'shapes': [(2, 3, 64)], 'dtypes': ['float32']}
    selection = Selection(**{**known, 'repeats': 7, **fields})
    said = []
    measurement = Measurement(selection, timer, 1000.0, said.append)
    assert list(measurement.run()) == measurement.rows
    return measurement.rows, measurement.left_out, said


def test_quantiles():
    timing = Timing([11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6], graph=True)
    assert [timing.quantile(share) for share in (0, 0.1, 0.5, 0.9, 1)] == [1, 2, 6, 10, 11]
    assert Timing([1.0, 2.0], graph=True).quantile(0.5) == 1.5
    assert Timing([3.0], graph=True).quantile(0.9) == 3.0


def test_row_has_the_figures_of_its_call(timer):
    rows, _, _ = measured(timer, impls=['torch'])
    assert [row['pass'] for row in rows] == ['fwd', 'bwd', 'fwd+bwd']
    elements = 2 * 3 * 64
    assert rows[1] == {
        'op': 'bi_wkv',
        'impl': 'torch',
        'pass': 'bwd',
        'dtype': 'float32',
        'shape': {'B': 2, 'T': 3, 'C': 64},
        'ours': True,
        'tokens': 3,
        'elements': elements,
        'least_bytes': elements * 20,
        'ms': 2.0,
        'ms_10': 1.2,
        'ms_90': 2.8,
        'repeats': 7,
        'gb_s': round(elements * 20 / 2e-3 / 1e9, 2),
        'copy_share': round(elements * 20 / 2e-3 / 1e9 / 1000, 4),
        'peak_mib': 0.5,
        'graph': True,
        'call': 'linvis::bi_wkv_bwd',
        'note': None,
    }
    assert set(rows[0]) == set(results.ROW_FIELDS)
    assert results.row_text(rows[0]).startswith('bi_wkv       torch          fwd ')


def test_rivals_and_definition_are_rows_beside_ours(timer):
    rows, left_out, said = measured(timer, dtypes=['bfloat16'], passes=['fwd'])
    names = [row['impl'] for row in rows]
    assert [name for name in names if name != 'triton'] == [
        'torch',
        'reference',
        'sdpa_flash',
        'copy',
    ]
    assert [row['impl'] for row in rows if row['ours'] and row['impl'] != 'triton'] == ['torch']
    reasons = {row['impl']: row['reason'] for row in left_out}
    assert 'fla-core cannot be used' in reasons['fla_rwkv4_x2']
    assert 'sdpa_cudnn' in reasons
    assert len(said) == len(left_out)
    assert not any(row['failed'] for row in left_out)


@pytest.mark.parametrize(
    ('error', 'reason', 'failed'),
    [
        (torch.OutOfMemoryError('CUDA out of memory. Tried'), 'out of memory', False),
        (ValueError('a kernel\nis broken'), 'ValueError: a kernel', True),
    ],
)
def test_what_fails_is_left_out_and_the_rest_measured(timer, monkeypatch, error, reason, failed):
    from linvis_ops.bi_wkv import op

    backends = mock.Mock(forward=mock.Mock(side_effect=error))
    monkeypatch.setattr(op._dispatch, 'select', lambda *_, **__: backends)
    rows, left_out, said = measured(timer, impls=['torch', 'copy'], passes=['fwd'])
    assert [row['impl'] for row in rows] == ['copy']
    assert [(row['reason'], row['failed']) for row in left_out] == [(reason, failed)]
    assert said == [f'bi_wkv torch is left out, first at fwd float32 B2-T3-C64: {reason}']


def test_unavailable_backend_is_no_failure(timer, monkeypatch):
    monkeypatch.setattr('linvis_ops._triton._import_error', lambda: 'triton is not here')
    rows, left_out, said = measured(timer, impls=['triton'])
    assert rows == []
    assert [row['failed'] for row in left_out] == [False] * 3
    assert len(said) == 1
    assert 'triton is not here' in left_out[0]['reason']


def test_operator_that_is_not_there_gets_one_line(timer, monkeypatch):
    monkeypatch.delattr('linvis_ops.q_shift')
    rows, _, said = measured(
        timer, operators=named(['bi_wkv', 'q_shift']), impls=['torch'], passes=['fwd']
    )
    assert len(rows) == 1
    assert said == ['q_shift is left out: linvis_ops has no operator q_shift.']


def test_cases():
    (wkv,) = named(['bi_wkv'])
    assert len(list(Selection([wkv]).cases(wkv))) == 7 * 2
    quick = Selection([wkv], quick=True)
    assert list(quick.cases(wkv)) == [({'B': 128, 'T': 196, 'C': 192}, 'bfloat16')]
    chosen = Selection([wkv], shapes=[(1, 2, 3), (4, 5, 6)], dtypes=['float16'], quick=True)
    assert [shape['T'] for shape, _ in chosen.cases(wkv)] == [2, 5]
    (shift,) = named(['q_shift'])
    both = Selection([wkv, shift], shapes=[(1, 2, 3)])
    assert list(both.cases(shift)) == []


def test_groups_of_implementations():
    (wkv,) = named(['bi_wkv'])
    ours = [one.name for one in Selection([wkv], impls=['ours']).chosen(wkv)]
    rivals = [one.name for one in Selection([wkv], impls=['rivals']).chosen(wkv)]
    assert ours == ['triton', 'cuda', 'torch']
    assert rivals == ['reference', 'sdpa_cudnn', 'sdpa_flash', 'fla_rwkv4_x2', 'copy']
    assert [one.name for one in Selection([wkv]).chosen(wkv)] == ours + rivals


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (
            {'impls': ['opencl']},
            "no implementation 'opencl'; there are ours, rivals, copy, cuda",
        ),
        (
            {'impls': ['fla_gla_x2']},
            "no implementation 'fla_gla_x2' of bi_wkv, only of bi_gla; there are ours, rivals",
        ),
        ({'shapes': [(1, 2)]}, 'the shape 1x2 fits no operator: bi_wkv BxTxC'),
    ],
)
def test_selection_of_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Selection(named(['bi_wkv']), **fields).check()


def test_selection_of_which_nothing_is_left_is_refused():
    operators = named(['bi_wkv', 'q_shift'])
    Selection(operators, shapes=[(2, 3, 64)], impls=['sdpa_flash']).check()
    with pytest.raises(ValueError, match='nothing is left') as raised:
        Selection(operators, shapes=[(2, 2, 3, 64)], impls=['sdpa_flash']).check()
    assert str(raised.value) == (
        'nothing is left to measure: bi_wkv: its axes are BxTxC, and the shapes are 2x2x3x64; '
        'q_shift: it has no implementation sdpa_flash.'
    )


def test_operators_that_nothing_selected_fits_get_one_line(timer):
    rows, left_out, said = measured(
        timer, operators=named(['q_shift', 'bi_wkv']), impls=['torch'], passes=['fwd']
    )
    assert [row['op'] for row in rows] == ['bi_wkv']
    assert left_out == []
    told = 'its axes are BxrowsxcolumnsxC, and the shapes are 2x3x64'
    assert said == [f'q_shift is left out: {told}.']


def test_selection_of_an_absent_operator_is_refused(monkeypatch):
    monkeypatch.delattr('linvis_ops.q_shift')
    with pytest.raises(ValueError, match='linvis_ops has no operator q_shift'):
        Selection(named(['q_shift'])).check()


def test_results_survive_a_file(tmp_path, make_row, make_results):
    rows = [make_row('triton', (1, 2, 64), 0.5), make_row('copy', (1, 2, 64), 0.25)]
    left_out = [{**{k: rows[0][k] for k in results.KEYS}, 'reason': 'why', 'failed': False}]
    made = make_results(rows, left_out)
    results.write(tmp_path / 'sub' / 'ops.json', made)
    assert results.read(tmp_path / 'sub' / 'ops.json') == made
    results.write(tmp_path / 'empty.json', make_results([]))
    assert results.read(tmp_path / 'empty.json')['rows'] == []


@pytest.mark.parametrize('where', ['header', 'rows'])
def test_other_layouts_are_refused(tmp_path, make_row, make_results, where):
    made = make_results([make_row('triton', (1, 2, 64), 0.5)])
    made['header'].pop('copy_gb_s') if where == 'header' else made['rows'][0].pop('ms')
    with pytest.raises(ValueError, match=r'these fields are missing or unknown: (ms|copy_gb_s)\.'):
        results.write(tmp_path / 'ops.json', made)
    (tmp_path / 'ops.json').write_text(json.dumps({'rows': []}))
    with pytest.raises(ValueError, match='results have header, rows and left_out, got rows'):
        results.read(tmp_path / 'ops.json')


def test_files_of_before_are_read(tmp_path, make_results):
    made = make_results([])
    for field in results.LATER_HEADER_FIELDS:
        del made['header'][field]
    (tmp_path / 'ops.json').write_text(json.dumps(made))
    assert results.read(tmp_path / 'ops.json') == made


def test_command_holds_no_places():
    typed = ['--out', '/home/me/x.json', '--op', 'bi_wkv', '--commit=abc', '--repeats', '3']
    assert results.command('run.py', typed) == 'python run.py --op bi_wkv --repeats 3'


@pytest.mark.parametrize(
    ('name', 'slug'),
    [
        ('NVIDIA H200', 'h200'),
        ('NVIDIA H100 80GB HBM3', 'h100'),
        ('NVIDIA H100 PCIe', 'h100-pcie'),
        ('NVIDIA A100-SXM4-80GB', 'a100-sxm4'),
        ('NVIDIA GeForce RTX 4090', 'geforce-rtx-4090'),
    ],
)
def test_gpu_in_file_names(name, slug, tmp_path):
    assert results.gpu_slug(name) == slug
    assert results.file(tmp_path, {'gpu': name}) == tmp_path / f'ops_{slug}.json'
    assert results.file(tmp_path / 'x.json', {'gpu': name}) == tmp_path / 'x.json'


def test_git_that_cannot_tell_is_no_error(tmp_path):
    assert results.git(tmp_path, 'rev-parse', 'HEAD') is None


def test_header_of_a_checkout_and_of_a_folder_without_git(monkeypatch, tmp_path):
    fake = mock.MagicMock(total_memory=2**37, L2_cache_size=50 * 2**20, major=9, minor=0)
    fake.name = 'NVIDIA H200'
    monkeypatch.setattr('torch.cuda.get_device_properties', lambda _: fake)
    measured = {'copies': {'copy 4.0': 4000.0}, 'copy_gb_s': 4000.0, 'copy_gib': 4.0}
    measured |= {'copy_way': 'kernel', 'floor_ms': 0.002, 'flush_mib': 256.0, 'complete': False}
    monkeypatch.setattr(results, 'git', lambda _, *words: {'rev-parse': 'abc'}.get(words[0], ''))
    header = results.make_header(tmp_path, 'python run.py', None, **measured)
    assert set(header) == set(results.HEADER_FIELDS)
    assert (header['commit'], header['dirty']) == ('abc', False)
    assert (header['capability'], header['memory_gib'], header['l2_mib']) == ('9.0', 128.0, 50.0)
    monkeypatch.undo()
    monkeypatch.setattr('torch.cuda.get_device_properties', lambda _: fake)
    header = results.make_header(tmp_path, 'python run.py', 'def', **measured)
    assert (header['commit'], header['dirty']) == ('def', None)


@pytest.fixture
def cuda(monkeypatch):
    """The parts of torch.cuda that the timer uses; records what happens in which order."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append('event')

        def elapsed_time(self, other):
            return 100.0

    def graph(captured, stream):
        context = mock.MagicMock()
        context.__enter__.side_effect = lambda: happened.append('capture')
        context.__exit__.return_value = False
        captured.replay = lambda: happened.append('replay')
        return context

    fake = mock.MagicMock(Event=Event, graph=graph, happened=happened)
    fake.get_device_properties.return_value.L2_cache_size = 100 * 2**20
    monkeypatch.setattr('benchmarks.timing.torch.cuda', fake)
    monkeypatch.setattr(CudaTimer, '_flush', lambda self: happened.append('flush'))
    return fake


def test_cuda_timer_replays_a_graph_on_a_cold_cache(cuda):
    timer = CudaTimer()
    assert timer.flush_bytes == 400 * 2**20
    timing = timer.times(lambda: cuda.happened.append('call'), repeats=50)
    assert timing == Timing([100.0] * 20, graph=True, note=None)  # 2 s of work
    repetition = ['flush', 'event', 'replay', 'event']
    assert cuda.happened == ['call'] * 4 + ['capture', 'call'] + repetition * (3 + 20)
    assert [call.args for call in cuda.set_sync_debug_mode.call_args_list] == [
        ('error',),
        ('default',),
    ]


def test_flush_writes_and_reads_its_buffer():
    timer = object.__new__(CudaTimer)
    timer._scratch, timer._sum = torch.ones(5), torch.ones(())
    timer._flush()
    assert not timer._scratch.any()
    assert timer._sum == 0


def test_cuda_timer_calls_what_synchronises_without_a_graph(cuda):
    def run():
        cuda.happened.append('call')
        if cuda.set_sync_debug_mode.call_args == mock.call('error'):
            raise RuntimeError('called a synchronizing CUDA operation')

    timing = CudaTimer().times(run, repeats=5)
    assert (timing.graph, timing.note) == (False, 'it synchronises host and device')
    assert cuda.happened[-4:] == ['flush', 'event', 'call', 'event']
    assert len(timing.samples) == 5
    assert cuda.set_sync_debug_mode.call_args == mock.call('default')


def test_cuda_timer_says_why_a_capture_failed(cuda):
    def run():
        if 'capture' in cuda.happened and cuda.happened[-1] == 'capture':
            raise RuntimeError('operation not permitted\nwhen stream is capturing')

    timing = CudaTimer().times(run, repeats=5)
    assert (timing.graph, timing.note) == (False, 'its capture failed: operation not permitted')


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('full'), RuntimeError('illegal access')])
def test_cuda_timer_hides_no_error_of_the_call(cuda, error):
    run = mock.Mock(side_effect=[None, None, None, error])
    with pytest.raises(RuntimeError) as raised:
        CudaTimer().times(run, repeats=5)
    assert raised.value is error


@pytest.mark.gpu
def test_cuda_timer_on_a_gpu():
    with CudaTimer() as timer:
        small, large = (torch.zeros(size, device='cuda') for size in (1, 2**26))
        floor = timer.times(lambda: small.add_(1), 20)
        fill = timer.times(lambda: large.add_(1), 20)
        waiting = timer.times(lambda: large.sum().item(), 20)
        base = timer.allocated()
        peak = timer.peak(lambda: large + 1)
    assert floor.graph
    assert fill.graph
    assert 0 < floor.quantile(0.5) < fill.quantile(0.5)
    assert fill.quantile(0.1) <= fill.quantile(0.5) <= fill.quantile(0.9)
    assert not waiting.graph
    assert peak - base == large.nbytes


def test_shares_are_those_of_the_fastest_copy(make_row):
    ours, copy = make_row('triton', (2, 16, 8), 2.0), make_row('copy', (2, 16, 8), 1.0)
    measured = mock.Mock(rows=[ours, copy], left_out=[])
    slower = {'copy_gb_s': copy['gb_s'] / 2, 'copy_gib': 4.0, 'copy_way': 'kernel'}
    found = results.assemble(slower, measured)
    size = round(copy['least_bytes'] / 2**30, 2)
    assert found['header'] == {'copy_gb_s': copy['gb_s'], 'copy_gib': size, 'copy_way': 'copy'}
    assert [row['copy_share'] for row in found['rows']] == [0.5, 1.0]
    faster = {'copy_gb_s': copy['gb_s'] * 2, 'copy_gib': 4.0, 'copy_way': 'kernel'}
    found = results.assemble(faster, measured)
    assert found['header'] == faster
    assert [row['copy_share'] for row in found['rows']] == [0.25, 0.5]
