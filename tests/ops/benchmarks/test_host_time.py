import json
import shlex

import pytest

from benchmarks import host_time, registry


@pytest.fixture
def on_cpu(with_gpu, monkeypatch):
    """host_time.py believes that there is a GPU, and measures few calls on the CPU."""
    monkeypatch.setattr(host_time, 'DEVICE', 'cpu')
    monkeypatch.setattr(host_time, 'CALLS', 2)
    monkeypatch.setattr(host_time, 'WARM_UP', 1)
    monkeypatch.setattr('torch.cuda.synchronize', lambda: None)


def test_every_operator_has_rows(on_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(host_time, 'PASSES', ('fwd',))
    out = tmp_path / 'host_time.json'
    assert host_time.main(['--blocks', '1', '--dtype', 'float32', '--out', str(out)]) == 0
    written = json.loads(out.read_text())
    assert written['header']['cpu'] == host_time.processor()
    first, *rows = written['rows']
    assert (first['op'], first['shape']) == ('empty_like', {})
    ours = [row for row in rows if row['impl'] == 'auto']
    assert [row['op'] for row in ours] == [operator.name for operator in registry.OPERATORS]
    assert all(row['shape']['B'] == 1 for row in ours)
    others = {row['op']: row['impl'] for row in rows if row['impl'] != 'auto'}
    assert others == {'layer_norm': 'torch_layer_norm', 'rms_norm': 'torch_rms_norm'}
    assert all(row['calls'] == 2 and row['us'] >= row['us_least'] > 0 for row in written['rows'])
    printed = capsys.readouterr().out
    assert printed.endswith(f'\nWrote {out}.\n')
    assert all(row['op'] in printed for row in rows)


def test_training_step_is_a_pass(on_cpu):
    rows = list(host_time.measure(registry.named(['q_shift']), 'float32', 3))
    assert [row['pass'] for row in rows] == ['fwd', 'fwd', 'fwd+bwd']
    assert all(row['calls'] == 6 for row in rows)


def test_time_of_a_block_is_that_of_its_calls(on_cpu, monkeypatch):
    clock = iter([0.0, 4e-6, 10e-6, 18e-6])
    monkeypatch.setattr(host_time.time, 'perf_counter', lambda: next(clock))
    assert host_time.times(lambda: None, 2) == pytest.approx([2.0, 4.0])


def test_commit_may_be_given(on_cpu, monkeypatch):
    given = []
    monkeypatch.setattr('benchmarks.results.make_header', lambda *call: given.append(call) or {})
    monkeypatch.setattr(host_time, 'PASSES', ('fwd',))
    asked = ['--op', 'q_shift', '--blocks', '1', '--dtype', 'float32']
    assert host_time.main([*asked, '--commit', 'abc']) == 0
    assert given[0][1:] == (shlex.join(['python', 'ops/benchmarks/host_time.py', *asked]), 'abc')


def test_unknown_operators_are_told_even_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr('benchmarks.run.has_gpu', lambda: False)
    assert host_time.main(['--op', 'wkv']) == 2
    assert "there is no operator 'wkv'" in capsys.readouterr().err


def test_machine_without_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr('benchmarks.run.has_gpu', lambda: False)
    assert host_time.main([]) == 2
    assert 'PyTorch finds none' in capsys.readouterr().err
