import signal
from pathlib import Path

import pytest
import torch


def sequence(name: str) -> list:
    import toy

    return toy.SEQUENCES[name]


def record(name: str, **settings: object) -> list[str]:
    """Options that name the list that a run writes its iterations to."""
    options = [f'custom_hooks.0.name={name}']
    return options + [f'custom_hooks.0.{key}={value}' for key, value in settings.items()]


def write_config(folder: Path, *changes: tuple[str, str]) -> None:
    text = (folder / 'config.py').read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / 'config.py').write_text(text)


def run_interrupted(run_train, kill_at: int, number: int = signal.SIGINT) -> tuple[int, int]:
    """Trains with a fixed seed: uninterrupted, and interrupted with a free seed and resumed."""
    first = run_train(
        '--work-dir', 'b', '--cfg-options', *record('b', kill_at=kill_at, number=int(number))
    )
    second = run_train('--work-dir', 'b', '--resume', '--cfg-options', *record('b'))
    return first, second


def run_whole(run_train, work_dir: str = 'a') -> list:
    assert run_train('--work-dir', work_dir, '--cfg-options', *record(work_dir)) == 0
    return sequence(work_dir)


@pytest.fixture(autouse=True)
def fixed_seed(toy_folder):
    with (toy_folder / 'config.py').open('a') as file:
        file.write('randomness = dict(seed=7)\n')


@pytest.mark.parametrize('kill_at', [3, 6, 8, 17], ids=lambda at: f'iter{at}')
def test_epoch_run_equals_uninterrupted_after_resume(run_train, kill_at):
    whole = run_whole(run_train)
    assert len(whole) == 18
    assert run_interrupted(run_train, kill_at) == (130, 0)
    assert sequence('b') == whole


def test_iter_run_equals_uninterrupted_after_resume(run_train, toy_folder):
    write_config(
        toy_folder,
        ('by_epoch=True, max_epochs=3', "type='IterBasedTrainLoop', max_iters=15, val_interval=5"),
        ("type='DefaultSampler', shuffle=True", "type='InfiniteSampler', shuffle=True"),
        ('by_epoch=True, milestones=[1, 2]', 'by_epoch=False, milestones=[6, 12]'),
    )
    whole = run_whole(run_train)
    assert len(whole) == 15
    assert run_interrupted(run_train, kill_at=7) == (130, 0)
    assert sequence('b') == whole


def test_workers_survive_the_signal(run_train, toy_folder):
    write_config(toy_folder, ('num_workers=0', 'num_workers=2'))
    whole = run_whole(run_train)
    assert run_interrupted(run_train, 8, signal.SIGTERM) == (143, 0)
    assert sequence('b') == whole


def test_samples_keep_their_order_without_a_fixed_seed(run_train, toy_folder):
    write_config(toy_folder, ('seed=7', 'seed=None'))
    assert run_interrupted(run_train, kill_at=8) == (130, 0)
    checkpoint = torch.load(Path('b/epoch_3.pth'), weights_only=False)
    # The whole run again, with the seed that the interrupted one drew.
    seed = checkpoint['meta']['seed']
    write_config(toy_folder, ('seed=None', f'seed={seed}'))
    whole = run_whole(run_train)
    assert [entry[4] for entry in sequence('b')] == [entry[4] for entry in whole]


def test_accumulated_gradients_are_applied_first(run_train, toy_folder):
    accumulating = 'optim_wrapper = dict(accumulative_counts=3, '
    write_config(toy_folder, ('optim_wrapper = dict(', accumulating))
    whole = run_whole(run_train)
    assert run_interrupted(run_train, kill_at=7) == (130, 0)
    assert (Path('b') / 'interrupted_iter_9.pth').is_file()
    assert sequence('b') == whole


@pytest.mark.parametrize(
    ('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)], ids=['term', 'usr1']
)
def test_signal_decides_the_exit_code(run_train, number, code):
    first, _ = run_interrupted(run_train, 4, number)
    assert first == code


def test_interrupted_validation_runs_first_after_resume(run_train):
    first = run_train(
        '--work-dir', 'b', '--cfg-options', *record('b', kill_at=6, number=2, val=True)
    )
    assert first == 130
    assert run_train('--work-dir', 'b', '--resume', '--cfg-options', *record('b', val=True)) == 0
    validations = [entry[1] for entry in sequence('b') if entry[0] == 'val']
    assert validations == [6, 6, 12, 18]
    assert sum(entry[0] != 'val' for entry in sequence('b')) == 18


def test_validation_of_averaged_weights_is_finished_first(run_train, toy_folder):
    write_config(toy_folder, ("dict(type='RecordHook')", "dict(type='RecordHook'), EMA"))
    text = (toy_folder / 'config.py').read_text()
    (toy_folder / 'config.py').write_text("EMA = dict(type='EMAHook', momentum=0.1)\n" + text)
    options = record('a', val=True)
    assert run_train('--work-dir', 'a', '--cfg-options', *options) == 0
    options = record('b', val=True, number=2, kill_at=6)
    assert run_train('--work-dir', 'b', '--cfg-options', *options) == 130
    options = record('b', val=True)
    assert run_train('--work-dir', 'b', '--resume', '--cfg-options', *options) == 0
    assert sequence('b') == sequence('a')


def test_message_says_how_to_go_on_and_old_checkpoint_goes(run_train):
    run_train('--work-dir', 'b', '--cfg-options', *record('b', kill_at=4, number=2))
    log = next(Path('b').glob('*/*.log')).read_text()
    assert 'go on with the same command and --resume' in log
    run_train('--work-dir', 'b', '--resume', '--cfg-options', *record('b', kill_at=9, number=2))
    kept = [path.name for path in Path('b').glob('interrupted_iter_*')]
    assert kept == ['interrupted_iter_9.pth']


def test_handlers_are_restored(run_train):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_train('--work-dir', 'b', '--cfg-options', *record('b', kill_at=4, number=2))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_second_signal_stops_at_once(monkeypatch):
    from linvis.engine import interrupt

    hook = interrupt.InterruptCheckpointHook()
    times = iter([10.0, 10.1, 12.0])
    monkeypatch.setattr(interrupt.time, 'monotonic', lambda: next(times))
    hook._on_signal(signal.SIGINT, None)
    # A launcher passes on the Ctrl-C that the terminal has sent already.
    hook._on_signal(signal.SIGINT, None)
    with pytest.raises(SystemExit) as stop:
        hook._on_signal(signal.SIGINT, None)
    assert stop.value.code == 130
