import json

import pytest
from PIL import Image


@pytest.fixture
def curves(load_tool):
    return load_tool('analysis/plot_curves.py')


def write_log(folder, timestamp, records):
    target = folder / timestamp / 'vis_data'
    target.mkdir(parents=True)
    (target / 'scalars.json').write_text('\n'.join(json.dumps(record) for record in records))


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / 'vrwkv-tiny'
    train = [
        {'lr': 0.1, 'loss': 3.0 - step, 'epoch': 1, 'iter': step, 'step': step, 'time': 0.1}
        for step in (1, 2)
    ]
    write_log(folder, '20260101_000000', [*train, {'accuracy/top1': 50.0, 'step': 1}])
    resumed = [{'lr': 0.1, 'loss': 0.5, 'epoch': 1, 'iter': 2, 'step': 2}]
    write_log(folder, '20260102_000000', [*resumed, {'accuracy/top1': 60.0, 'step': 2}])
    return folder


def test_curves_join_resumed_runs(curves, work_dir):
    run = curves.Run(work_dir)
    assert run.train['loss'] == ([1, 2], [2.0, 0.5])
    assert run.val['accuracy/top1'] == ([1, 2], [50.0, 60.0])
    assert run.val_unit == 'epoch'


def test_figure_has_labels_and_units(curves, work_dir):
    figure = curves.plot([curves.Run(work_dir)])
    labels = {axis.get_title(): (axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes}
    assert labels['loss'][0] == 'iteration'
    assert labels['lr'][1] == 'learning rate'
    assert labels['accuracy/top1'] == ('epoch', 'accuracy/top1 (%)')
    assert 'vrwkv-tiny' in figure.get_suptitle()


def test_command_writes_a_picture(curves, work_dir, tmp_path):
    out = tmp_path / 'plots' / 'curves.png'
    assert curves.main([str(work_dir), str(work_dir), '--out', str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > 1000


def test_command_names_what_is_missing(curves, work_dir, tmp_path, capsys):
    assert curves.main([str(tmp_path / 'none'), '--out', str(tmp_path / 'a.png')]) == 1
    assert 'holds no */vis_data/scalars.json' in capsys.readouterr().err
    arguments = [str(work_dir), '--out', str(tmp_path / 'a.png'), '--keys', 'mAP']
    assert curves.main(arguments) == 1
    assert 'mAP: not logged; there are accuracy/top1, loss, lr' in capsys.readouterr().err


def test_a_metric_measured_once_gets_no_panel(curves, work_dir):
    write_log(work_dir, '20260103_000000', [{'mIoU': 40.0, 'step': 0}])
    figure = curves.plot([curves.Run(work_dir)])
    assert 'mIoU' not in {axis.get_title() for axis in figure.axes}


def test_picture_that_cannot_be_written_is_told(curves, work_dir, tmp_path, capsys):
    assert curves.main([str(work_dir), '--out', str(tmp_path / 'curves.xyz')]) == 1
    assert 'curves.xyz cannot be written' in capsys.readouterr().err
