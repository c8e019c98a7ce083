import json
import sys
import types
from pathlib import Path

import pytest
import torch

from tools.analysis import throughput

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


def run(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['throughput.py', *arguments])
    return throughput.main()


def test_shapes_are_pixels_and_batch(monkeypatch):
    monkeypatch.setattr('sys.argv', ['throughput.py', '--shape', '224x256', '512x64'])
    args = throughput.parse_arguments()
    assert args.shape == [(224, 256), (512, 64)]
    assert args.network == ['vrwkv-tiny']


@pytest.mark.parametrize('text', ['224', 'x', '224x', '0x8', '-3x4', '224x256x3', 'axb'])
def test_other_shapes_are_refused(monkeypatch, capsys, text):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, f'--shape={text}')
    assert ended.value.code == 2
    assert f'expected PIXELSxBATCH, such as 224x256, got {text!r}' in capsys.readouterr().err


def test_unknown_network_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, '--network', 'vig-tyni')
    assert "'vig-tyni'" in capsys.readouterr().err


def test_networks_have_the_names_of_their_configs():
    configs = [path.name for path in Path('configs').glob('*/v*_in1k*.py')]
    assert len(configs) >= 15
    named = {config.partition('_')[0] for config in configs}
    named -= {'vir-large-p14'}  # vir-large with patches of 14 pixels
    assert named <= set(throughput.NETWORKS)


@pytest.mark.parametrize(
    'name', ['vrwkv-tiny', 'vig-tiny', 'vig-h-tiny', 'vir-small', 'vir-hybrid-tiny']
)
def test_networks_give_one_vector_a_picture(monkeypatch, name):
    monkeypatch.setattr('torch.nn.Module.cuda', lambda self: self)
    (features,) = throughput.build(name, 64)(torch.zeros(1, 3, 64, 64))
    assert features.dim() == 2


@needs_no_gpu
def test_missing_gpu_is_told_in_one_sentence(monkeypatch, capsys):
    assert run(monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err == (
        'Throughput is measured on a CUDA GPU, and PyTorch finds none; '
        '`python tools/env_report.py` says what it does find.\n'
    )


def test_missing_timm_is_told_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, '--rival', 'deit_tiny_patch16_224')
    assert ended.value.code == 2
    told = 'throughput.py: --rival needs timm: pip install timm; --help lists the options.\n'
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        (['--network', '--rival'], 'there is nothing to measure without names after --network'),
        (['--out', 'nowhere/rows.json'], '--out: there is no folder nowhere; make it first'),
    ],
)
def test_what_cannot_be_done_is_told_before_a_missing_gpu(monkeypatch, capsys, arguments, told):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count('\n') == 1


def test_everything_asked_for_is_measured(monkeypatch, tmp_path, capsys):
    calls = []

    def measure(*call):
        calls.append(call)
        failed = {'failed': 'out of memory'} if call[1] == 96 else {}
        return [{'network': call[0], 'launch': launch, **failed} for launch in call[-1]]

    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr(throughput.results, 'make_header', lambda *_: {'gpu': 'a GPU'})
    monkeypatch.setattr(throughput, 'measure', measure)
    out = tmp_path / 'rows.json'
    arguments = ('--network', 'vig-tiny', '--mode', 'train', '--launch', 'graph', '--out', str(out))
    assert run(monkeypatch, *arguments, '--shape', '224x8', '96x2') == 1  # the second one failed
    assert calls == [
        ('vig-tiny', 224, 8, 'train', 'eager', ['graph']),
        ('vig-tiny', 224, 8, 'train', 'compiled', ['graph']),
        ('vig-tiny', 96, 2, 'train', 'eager', ['graph']),
        ('vig-tiny', 96, 2, 'train', 'compiled', ['graph']),
    ]
    written = json.loads(out.read_text())
    assert capsys.readouterr().out.endswith(f'\nWrote {out}.\n')
    assert written['header'] == {'gpu': 'a GPU'}
    assert len(written['rows']) == 4


def test_launches_after_a_failure_are_told_as_failed(monkeypatch):
    """A network that runs but cannot be captured keeps its first row."""
    monkeypatch.setitem(
        sys.modules, 'triton.testing', types.SimpleNamespace(do_bench=lambda *_, **__: 2.0)
    )
    monkeypatch.setattr(throughput, 'build', lambda *_: torch.nn.Identity())
    monkeypatch.setattr(throughput, 'runner', lambda *_: lambda: None)
    monkeypatch.setattr('torch.randn', lambda *_, **__: None)
    for name in ('empty_cache', 'reset_peak_memory_stats'):
        monkeypatch.setattr(f'torch.cuda.{name}', lambda: None)
    monkeypatch.setattr('torch.cuda.max_memory_allocated', lambda: 3 * 2**20)

    def captured(run):
        raise RuntimeError('not in a capture\nmore')

    monkeypatch.setattr(throughput, 'captured', captured)
    rows = throughput.measure('vig-tiny', 64, 8, 'inference', 'eager', ('host', 'graph'))
    about = {'network': 'vig-tiny', 'mode': 'inference', 'form': 'eager', 'pixels': 64, 'batch': 8}
    assert rows == [
        {**about, 'launch': 'host', 'ms': 2.0, 'images_s': 4000.0, 'peak_mib': 3},
        {**about, 'launch': 'graph', 'failed': 'RuntimeError: not in a capture'},
    ]


@pytest.mark.gpu
def test_rows_of_a_network_on_a_gpu(monkeypatch, tmp_path):
    out = tmp_path / 'rows.json'
    assert run(monkeypatch, '--shape', '64x2', '--form', 'eager', '--out', str(out)) == 0
    rows = json.loads(out.read_text())['rows']
    assert [(row['mode'], row['launch']) for row in rows] == [
        ('inference', 'host'),
        ('inference', 'graph'),
        ('train', 'host'),
        ('train', 'graph'),
    ]
    assert all(row['images_s'] > 0 and row['peak_mib'] > 0 for row in rows)
