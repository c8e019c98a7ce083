import json
import math

import pytest
import torch

from benchmarks import tune
from linvis_ops.bi_wkv.launch import DEFAULT, Rule, launch_for


def test_search_keeps_the_fastest_value_of_every_field():
    wanted = Rule(8, channels=128, per_thread=2, programs=24, most_blocks=32, group_above=64,
                  group=16, at_once=8)  # fmt: skip

    def distance(rule):
        fields = ('length', 'channels', 'programs', 'most_blocks', 'group_above', 'at_once')
        return 1.0 + sum(abs(math.log(getattr(rule, f) / getattr(wanted, f))) for f in fields)

    assert tune.search(DEFAULT['fwd'], distance) == wanted


def test_search_keeps_the_rule_in_use_if_nothing_is_faster():
    assert tune.search(DEFAULT['bwd'], lambda rule: 1.0) == DEFAULT['bwd']


def test_what_does_not_fit_the_gpu_is_never_chosen(monkeypatch, timer):
    pytest.importorskip('triton')
    from triton.runtime.errors import OutOfResources

    def too_large(_launch):
        raise OutOfResources(300_000, 232_448, 'shared memory')

    call = tune.Call((1, 8, 4), torch.float32, 'fwd', 'cpu')
    monkeypatch.setattr(tune.Call, '__call__', lambda self, launch: too_large(launch))
    assert tune.time_of(call, DEFAULT['fwd'], timer, 3) == math.inf


def test_trials_are_written_and_the_result_is_printed(with_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        tune, 'time_of', lambda call, rule, timer, repeats: 1.0 + (rule.programs != 16)
    )
    monkeypatch.setattr(tune, 'CudaTimer', tune.run.CudaTimer)
    out = tmp_path / 'tuned.json'
    options = ['--pass', 'fwd', '--shape', '1x8x4', '2x9x4', '--out', str(out)]
    assert tune.main(options) == 0
    trials = json.loads(out.read_text())
    assert trials[0]['ms'] == {'1x8x4': 2.0, '2x9x4': 2.0}
    assert trials[0]['mean'] == pytest.approx(2.0)
    *_, best, last = capsys.readouterr().out.splitlines()
    assert best.startswith('best for None: ')
    assert 'programs=16' in best
    assert last == f'Wrote {out}.'


def test_trials_that_do_not_fit_are_valid_json(with_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(
        tune, 'time_of', lambda call, rule, *_: math.inf if rule.programs == 16 else 1.0
    )
    monkeypatch.setattr(tune, 'CudaTimer', tune.run.CudaTimer)
    out = tmp_path / 'tuned.json'
    assert tune.main(['--pass', 'fwd', '--shape', '1x8x4', '--out', str(out)]) == 0

    def refuse(word):
        raise AssertionError(word)

    trials = json.loads(out.read_text(), parse_constant=refuse)
    assert {trial['ms']['1x8x4'] for trial in trials} == {1.0, None}


def test_machine_without_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr('benchmarks.run.has_gpu', lambda: False)
    assert tune.main([]) == 2
    assert 'PyTorch finds none' in capsys.readouterr().err


def test_shapes_that_are_not_those_of_bi_wkv_are_told_before_a_missing_gpu(monkeypatch, capsys):
    monkeypatch.setattr('benchmarks.run.has_gpu', lambda: False)
    assert tune.main(['--shape', '1x8x4', '1x2']) == 2
    told = 'tune.py: the shape 1x2 fits no operator: bi_wkv BxTxC.\n'
    assert capsys.readouterr().err == told


def test_longer_lanes_where_there_are_more_programs():
    few = launch_for(torch.empty(1, 4096, 64, device='meta'), 'fwd', Rule(16, programs=64))
    many = launch_for(torch.empty(1, 4096, 64, device='meta'), 'fwd', Rule(16, programs=16))
    assert (few.blocks, few.lanes) == (4, 64)
    assert (many.blocks, many.lanes) == (16, 16)
    assert few.group == 8
    assert many.group == many.lanes


def test_programs_are_as_narrow_as_the_network():
    assert launch_for(torch.empty(1, 8, 20, device='meta'), 'fwd').channels == 32
    assert launch_for(torch.empty(1, 8, 192, device='meta'), 'fwd').channels == 64
