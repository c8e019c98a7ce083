import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('verify_data', ROOT / 'tools' / 'verify_data.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('kind', ['imagenet', 'coco', 'ade'])
def test_verify_data_passes_the_mini_sets(tool, kind, capsys):
    root = ROOT / 'data' / 'mini' / kind
    assert tool.main([kind, str(root), '--any-count', '--decode', '--workers', '2']) == 0
    assert capsys.readouterr().out == f'{root}: in order\n'


def test_verify_data_fails_with_a_line_for_each_problem(tool, tmp_path, capsys):
    assert tool.main(['ade', str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 4
    assert 'problems found: 4' in captured.err


def test_verify_data_shows_twenty_problems_and_counts_the_rest(tool, tmp_path, capsys):
    for split in ('train', 'val'):
        for number in range(30):
            (tmp_path / split / f'n{number:02d}').mkdir(parents=True)
    assert tool.main(['imagenet', str(tmp_path), '--any-count']) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[-1] == '... and 42 more'  # 2 x 30 empty folders and 2 splits without pictures


@pytest.mark.parametrize('arguments', [['voc', '.'], ['coco'], ['coco', '.', '--workers', '-1']])
def test_verify_data_refuses_wrong_command_lines(tool, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(arguments)
    assert error.value.code == 2
    assert 'error' in capsys.readouterr().err
