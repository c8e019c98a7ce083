import json

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
    assert args.arch == ['tiny']
    assert not args.eager_only


@pytest.mark.parametrize('text', ['224', 'x', '224x', '0x8', '-3x4', '224x256x3', 'axb'])
def test_other_shapes_are_refused(monkeypatch, capsys, text):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, f'--shape={text}')
    assert ended.value.code == 2
    assert f'expected PIXELSxBATCH, such as 224x256, got {text!r}' in capsys.readouterr().err


def test_unknown_arch_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, '--arch', 'tyni')
    assert "'tyni'" in capsys.readouterr().err


@needs_no_gpu
def test_missing_gpu_is_told_in_one_sentence(monkeypatch, capsys):
    assert run(monkeypatch) == 1
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err == 'Throughput is measured on an NVIDIA GPU, and PyTorch finds none.\n'


def test_missing_timm_is_told_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert run(monkeypatch, '--rival', 'deit_tiny_patch16_224') == 1
    assert capsys.readouterr().err == '--rival needs timm: pip install timm.\n'


def test_every_network_is_measured_eager_and_compiled_at_every_shape(monkeypatch, tmp_path):
    calls = []

    def measure(*call):
        calls.append(call)
        return [{'ms': 1.0}]

    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda: 'a GPU')
    monkeypatch.setattr(throughput, 'measure', measure)
    out = tmp_path / 'rows.json'
    assert run(monkeypatch, '--arch', 'tiny', '--shape', '224x8', '96x2', '--out', str(out)) == 0
    assert calls == [
        ('linvis', 'tiny', 224, 8, False),
        ('linvis', 'tiny', 224, 8, True),
        ('linvis', 'tiny', 96, 2, False),
        ('linvis', 'tiny', 96, 2, True),
    ]
    written = json.loads(out.read_text())
    assert written['gpu'] == 'a GPU'
    assert len(written['rows']) == 4


@pytest.mark.gpu
def test_rows_of_a_network_on_a_gpu(monkeypatch, tmp_path):
    out = tmp_path / 'rows.json'
    assert run(monkeypatch, '--shape', '64x2', '--eager-only', '--out', str(out)) == 0
    rows = json.loads(out.read_text())['rows']
    assert [row['mode'] for row in rows] == ['inference', 'train']
    assert all(row['images_s'] > 0 and row['peak_mib'] > 0 for row in rows)
