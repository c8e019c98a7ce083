"""tools/quickstart.py with stand-ins for the four tools that it calls."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Stands for every tool. It writes down its arguments and leaves what the real one leaves. With
# `slow` in the folder of the stand-ins a training lasts until a signal, with `broken` it fails, and
# with `together` it ends when three are under way.
TOOL = """
import signal, sys, time
from pathlib import Path

name, args = Path(sys.argv[0]).name, sys.argv[1:]
root = Path(__file__).parents[1 if name in ('train.py', 'test.py') else 2]
with (root / 'calls').open('a') as file:
    print(name, *args, file=file)
if name == 'train.py':
    work_dir = Path(args[args.index('--work-dir') + 1])
    work_dir.mkdir(parents=True, exist_ok=True)
    print('mmengine - INFO - Iter(train) [ 50/600]  lr: 1e-3  eta: 0:01:00  loss: 2.5  memory: 9')
    if (root / 'slow').exists():
        def stop(number, frame):
            print('saving a checkpoint', flush=True)
            sys.exit(0)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        (root / 'training').touch()
        time.sleep(60)
    if (root / 'together').exists():
        (work_dir / 'under_way').touch()
        for _ in range(600):
            if len(list(work_dir.parents[1].glob('*/*/under_way'))) == 3:
                break
            time.sleep(0.05)
        else:
            sys.exit('The others do not come.')
    if (root / 'broken').exists():
        sys.exit('ValueError: out of luck.')
    (work_dir / 'last_checkpoint').write_text('/elsewhere/iter_600.pth')
elif name == 'test.py':
    out = Path(args[args.index('--out') + 1])
    score = '1' if args[1] == 'none' else '51.25'
    out.parent.mkdir(parents=True, exist_ok=True)
    names = ('accuracy/top1', 'mIoU', 'coco/bbox_mAP', 'coco/segm_mAP')
    out.write_text('{%s}' % ', '.join(f'"{name}": {score}' for name in names))
"""
TOOLS = ('train.py', 'test.py', 'analysis/plot_curves.py')


@pytest.fixture
def quickstart(load_tool, tmp_path, monkeypatch):
    """The tool, in a checkout whose other tools are stand-ins; signal handlers are restored."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    module = load_tool('quickstart.py')
    root = make_checkout(tmp_path / 'checkout', module)
    monkeypatch.setattr(module, 'ROOT', root)
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_checkout(root: Path, module) -> Path:
    for name in TOOLS:
        path = root / 'tools' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TOOL)
    for task in module.TASKS.values():
        for config in task.configs.values():
            path = root / config
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('model = {}\n')
    return root


def run(module, work_dir: Path, *options: str) -> int:
    return module.main(
        ['--tasks', 'segmentation', '--device', 'cpu', '--work-dir', str(work_dir), *options]
    )


def calls(module) -> list[list[str]]:
    """Calls of the stand-ins since the last look."""
    file = module.ROOT / 'calls'
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [line.split() for line in lines]


def test_steps_are_run_in_order_and_the_table_has_both_scores(quickstart, tmp_path, capsys):
    work_dir = tmp_path / 'out'
    assert run(quickstart, work_dir) == 0
    before, train, after, curves = calls(quickstart)
    folder = work_dir / 'vrwkv' / 'segmentation'
    assert before[0] == after[0] == 'test.py'
    assert before[2] == 'none'
    assert train[0] == 'train.py'
    assert '--resume' in train
    # the checkpoint that the training names, in the folder where it is now
    assert after[2] == str(folder / 'segmentation' / 'iter_600.pth')
    assert after[after.index('--show-dir') + 1] == str(folder / 'predictions')
    assert curves[0] == 'plot_curves.py'
    assert all(call[call.index('--device') + 1] == 'cpu' for call in (before, train, after))
    (row,) = json.loads((work_dir / 'vrwkv' / 'summary.json').read_text())['rows']
    assert (row['task'], row['untrained'], row['trained']) == ('segmentation', 1, 51.25)
    printed = capsys.readouterr().out
    assert 'Iter(train) [ 50/600]  eta 0:01:00  loss 2.5' in printed
    assert '51.2' in printed
    assert 'mini data' in printed


def test_tasks_run_at_the_same_time(quickstart, tmp_path, capsys):
    (quickstart.ROOT / 'together').touch()
    assert quickstart.main(['--device', 'cpu', '--jobs', '3', '--work-dir', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert '    detection: Iter(train) [ 50/600]  eta 0:01:00' in printed
    rows = json.loads((tmp_path / 'vrwkv' / 'summary.json').read_text())['rows']
    assert [row['task'] for row in rows] == [
        *('classification', 'classification', 'detection', 'detection', 'segmentation')
    ]


def test_a_failure_keeps_the_next_task_from_beginning(quickstart, tmp_path, capsys):
    (quickstart.ROOT / 'broken').touch()
    assert quickstart.main(['--device', 'cpu', '--jobs', '1', '--work-dir', str(tmp_path)]) == 1
    assert 'classification: training failed' in capsys.readouterr().err
    assert not (tmp_path / 'vrwkv' / 'segmentation').exists()


@pytest.mark.parametrize(
    ('device', 'cores', 'gpu', 'jobs'),
    [('auto', 8, True, 3), ('auto', 8, False, 1), ('cpu', 8, True, 1), ('cuda', 2, True, 1)],
)
def test_all_tasks_run_at_once_beside_a_gpu(quickstart, monkeypatch, device, cores, gpu, jobs):
    monkeypatch.setattr(quickstart.os, 'sched_getaffinity', lambda _: range(cores))
    monkeypatch.setattr('torch.cuda.is_available', lambda: gpu)
    assert quickstart.jobs_for(device, tasks=3) == jobs


def test_no_jobs_are_refused(quickstart, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(['--jobs', '0'])
    assert '--jobs must be at least 1, not 0' in capsys.readouterr().err


def test_summary_keeps_the_rows_of_other_tasks(quickstart, tmp_path):
    for task in ('segmentation', 'detection'):
        options = ['--tasks', task, '--device', 'cpu', '--work-dir', str(tmp_path)]
        assert quickstart.main(options) == 0
    rows = json.loads((tmp_path / 'vrwkv' / 'summary.json').read_text())['rows']
    assert [row['task'] for row in rows] == ['detection', 'detection', 'segmentation']


def test_second_run_repeats_nothing_and_prints_the_same_table(quickstart, tmp_path, capsys):
    run(quickstart, tmp_path)
    first = json.loads((tmp_path / 'vrwkv' / 'summary.json').read_text())
    calls(quickstart)
    capsys.readouterr()
    assert run(quickstart, tmp_path) == 0
    assert calls(quickstart) == []
    assert json.loads((tmp_path / 'vrwkv' / 'summary.json').read_text()) == first
    assert '51.2' in capsys.readouterr().out


def test_fresh_run_and_changed_config_start_anew(quickstart, tmp_path, capsys):
    run(quickstart, tmp_path)
    calls(quickstart)
    assert run(quickstart, tmp_path, '--fresh') == 0
    assert len(calls(quickstart)) == 4
    config = quickstart.ROOT / quickstart.TASKS['segmentation'].configs['vrwkv']
    base = config.parent / '_base_' / 'recipe.py'
    base.parent.mkdir()
    base.write_text("_base_ = 'mmseg::_base_/models/upernet_swin.py'\n")
    changes = (
        (config, "_base_ = ['./_base_/recipe.py']\n"),
        (base, "_base_ = ['mmseg::_base_/models/upernet_r50.py']\n"),
    )
    for file, text in changes:
        file.write_text(text)
        capsys.readouterr()
        assert run(quickstart, tmp_path) == 0
        assert len(calls(quickstart)) == 4
        assert 'The config of segmentation has changed' in capsys.readouterr().out
    (base.parent / 'of_another_task.py').write_text('model = None\n')
    assert run(quickstart, tmp_path) == 0
    assert calls(quickstart) == []


def test_backbones_have_folders_of_their_own(quickstart, tmp_path):
    run(quickstart, tmp_path)
    calls(quickstart)
    assert run(quickstart, tmp_path, '--backbone', 'vig-h') == 0
    configs = {call[1] for call in calls(quickstart) if call[0] != 'plot_curves.py'}
    assert configs == {quickstart.TASKS['segmentation'].configs['vig-h']}
    assert (tmp_path / 'vrwkv' / 'summary.json').is_file()
    assert (tmp_path / 'vig-h' / 'summary.json').is_file()


def test_failed_step_is_named_with_its_log_and_run_again(quickstart, tmp_path, capsys):
    broken = quickstart.ROOT / 'broken'
    broken.touch()
    assert run(quickstart, tmp_path) == 1
    log = tmp_path / 'vrwkv' / 'segmentation' / 'train.log'
    error = capsys.readouterr().err
    assert f'segmentation: training failed with status 1; its output is in {log}' in error
    assert error.endswith('ValueError: out of luck.\n')
    assert 'ValueError: out of luck.' in log.read_text()
    broken.unlink()
    calls(quickstart)
    assert run(quickstart, tmp_path) == 0
    assert [call[0] for call in calls(quickstart)] == ['train.py', 'test.py', 'plot_curves.py']


def test_checkpoint_that_is_gone_is_told(quickstart, tmp_path, capsys):
    run(quickstart, tmp_path)
    state = tmp_path / 'vrwkv' / 'segmentation' / 'state.json'
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {'done': ['before', 'train']}))
    pointer = tmp_path / 'vrwkv' / 'segmentation' / 'segmentation' / 'last_checkpoint'
    pointer.unlink()
    assert run(quickstart, tmp_path) == 1
    assert f'{pointer} is gone: train again with --fresh.' in capsys.readouterr().err


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_step_end_and_the_next_run_goes_on(quickstart, project, tmp_path, number):
    root = quickstart.ROOT
    (root / 'slow').touch()
    program = (root / 'tools' / 'quickstart.py').resolve()
    program.write_text((project / 'tools' / 'quickstart.py').read_text())
    arguments = ['--tasks', 'segmentation', '--device', 'cpu', '--work-dir', str(tmp_path / 'out')]
    process = subprocess.Popen(
        [sys.executable, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (root / 'training').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert error == 'Stopped; the same command goes on from here.\n'
    folder = tmp_path / 'out' / 'vrwkv' / 'segmentation'
    assert 'saving a checkpoint' in (folder / 'train.log').read_text()
    assert json.loads((folder / 'state.json').read_text())['done'] == ['before']
    (root / 'slow').unlink()
    calls(quickstart)
    assert run(quickstart, tmp_path / 'out') == 0
    assert [call[0] for call in calls(quickstart)] == ['train.py', 'test.py', 'plot_curves.py']


def test_unknown_task_is_refused(quickstart, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(['--tasks', 'depth'])
    assert "'depth'" in capsys.readouterr().err


def test_table_is_aligned(quickstart):
    row = {'task': 'a', 'metric': 'top-1 (%)', 'measured on': '86 crops', 'minutes': 2.04}
    rows = [row | {'untrained': 9.96, 'trained': 100.0}, row | {'untrained': 1.0, 'trained': 2.0}]
    header, rule, first, second = quickstart.table(rows).splitlines()
    assert rule == '-' * max(map(len, (header, first, second)))
    assert first.split()[-3:] == ['10.0', '100.0', '2.0']
    assert len(first) == len(second) == len(header)


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        (
            '11/22 - mmengine - INFO - Epoch(val) [12/12]    mIoU: 31.2  aAcc: 60.0  time: 0.1',
            'Epoch(val) [12/12]  mIoU 31.2',
        ),
        ('Iter(test) [ 5/9]    eta: 0:00:03  time: 0.5', 'Iter(test) [ 5/9]  eta 0:00:03'),
        ('Saving checkpoint at 5 iterations', None),
        ('', None),
    ],
)
def test_progress_shows_a_few_values(quickstart, line, expected):
    assert quickstart.progress(line, ['mIoU']) == expected


def test_configs_of_the_tasks_exist(quickstart, project):
    for task in quickstart.TASKS.values():
        assert list(task.configs) == list(quickstart.BACKBONES)
        assert all((project / config).is_file() for config in task.configs.values())
