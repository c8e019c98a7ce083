import importlib.metadata
import json

import pytest

import linvis_ops
from linvis.utils import environment


def test_report_has_every_section():
    report = environment.collect_environment()
    assert set(report) == {'System', 'Packages', 'Devices', 'Operators', 'Libraries', 'Data'}
    assert report['Packages']['torch'] == importlib.metadata.version('torch')
    assert set(report['Operators']) >= {'bi_wkv', 'q_shift'}
    json.dumps(report)


def test_missing_package_comes_with_the_command(monkeypatch: pytest.MonkeyPatch):
    version = importlib.metadata.version

    def without_mmdet(name: str) -> str:
        if name in ('onedl-mmdetection', 'mmdet', 'faster-coco-eval', 'pycocotools'):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, 'version', without_mmdet)
    report = environment.collect_environment()
    command = 'missing: pip install --no-deps onedl-mmdetection'
    assert report['Packages']['mmdet'] == command
    assert report['Libraries']['COCO evaluation'] == 'missing: pip install faster-coco-eval'
    assert not any('mmdet' in line for line in environment.startup_lines('cpu'))


def test_every_public_operator_is_reported():
    # retention_with_state runs by the backend of retention
    public = set(linvis_ops.__all__) - set(vars(linvis_ops._dispatch)) - {'retention_with_state'}
    described = environment.operator_backends()
    assert list(described) == sorted(public)


def test_operator_without_a_choice_of_backends_says_so(monkeypatch):
    monkeypatch.setattr(linvis_ops, 'operators', lambda: ('bi_wkv',))
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'torch')
    assert environment.operator_backends()['ms_deform_attn'] == 'reference (the only one)'


def test_operators_say_why_a_backend_does_not_run(monkeypatch: pytest.MonkeyPatch):
    import linvis_ops

    monkeypatch.setattr(linvis_ops, 'operators', lambda: ('bi_wkv',))
    reasons = {'triton': 'there is no CUDA device', 'torch': None, 'reference': None}
    monkeypatch.setattr(linvis_ops, 'available_backends', lambda name: reasons)
    monkeypatch.setattr(linvis_ops, 'default_backend', lambda name: 'torch')
    described = environment.operator_backends()
    assert described['bi_wkv'] == 'torch (no triton: there is no CUDA device)'


def test_backend_that_is_asked_for_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'reference')
    assert environment.operator_backends()['bi_wkv'].startswith('reference')


def test_operator_without_the_backend_that_is_asked_for_says_so(monkeypatch):
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'torch')
    monkeypatch.setattr(linvis_ops, 'operators', lambda: ('toy', 'bi_wkv'))
    monkeypatch.setitem(
        linvis_ops._dispatch._BACKENDS,
        'toy',
        (linvis_ops._dispatch.Backend('only', lambda *_: None, list, list),),
    )
    described = environment.operator_backends()
    assert described['toy'] == 'only (it has no backend torch)'
    assert described['bi_wkv'].startswith('torch')


@pytest.mark.parametrize(
    ('name', 'message'),
    [('nonsense', "there is no backend 'nonsense'"), ('triton', 'triton cannot run, since')],
)
def test_backend_that_cannot_run_is_told_before_anything_runs(monkeypatch, name, message):
    from linvis_ops import BackendUnavailableError, available_backends

    if name == 'triton' and available_backends('bi_wkv')['triton'] is None:
        pytest.skip('Triton runs here')
    monkeypatch.setenv('LINVIS_OPS_BACKEND', name)
    with pytest.raises(BackendUnavailableError, match=message):
        environment.startup_lines('cpu, 1 process')
    assert message in environment.collect_environment()['Operators']['error']


def test_devices_without_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment.torch.cuda, 'is_available', lambda: False)
    assert environment.collect_environment()['Devices']['GPU'] == 'none'


def test_data_folders_name_what_they_lack(tmp_path):
    (tmp_path / 'data' / 'imagenet' / 'train').mkdir(parents=True)
    (tmp_path / 'data' / 'mini' / 'coco').mkdir(parents=True)
    folders = environment.collect_environment(tmp_path)['Data']
    assert folders['data/imagenet'] == 'lacks val'
    assert folders['data/mini/coco'] == 'found'
    assert folders['data/coco'] == 'not there'


def test_table_aligns_all_entries():
    text = environment.format_environment({'A': {'x': '1'}, 'B': {'long name': '2'}})
    assert text.splitlines() == ['A', '  x          1', 'B', '  long name  2']


def test_startup_lines_are_few_and_name_the_device():
    lines = environment.startup_lines('cpu, 1 process(es)')
    assert len(lines) == 4
    assert 'cpu, 1 process(es)' in lines[1]
