"""Command lines, files and exit status of run.py and verify.py; tests before figures."""

import argparse
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import command_line, passes, results, run, verify
from benchmarks.timing import Timing

ROOT = Path(__file__).resolve().parents[3]
TINY = ['--op', 'bi_wkv', '--shape', '2x3x64', '--dtype', 'float32', '--pass', 'fwd']
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


@pytest.mark.parametrize('program', [run, verify], ids=['run', 'verify'])
def test_missing_gpu_is_told_in_one_sentence(monkeypatch, capsys, program):
    monkeypatch.setattr(run, 'has_gpu', lambda: False)
    assert program.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err == (
        'Operators are measured on a CUDA GPU, and PyTorch finds none; '
        '`python tools/env_report.py` says what it does find.\n'
    )


@needs_no_gpu
def test_script_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'ops/benchmarks/verify.py')],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, f'{run.NO_GPU}\n')


def test_rows_are_printed_and_written(with_gpu, capsys, tmp_path):
    assert run.main([*TINY, '--impl', 'torch', 'copy', '--out', str(tmp_path)]) == 0
    written = results.read(tmp_path / 'ops_stand-in.json')
    assert [row['impl'] for row in written['rows']] == ['torch', 'copy']
    assert written['header']['floor_ms'] == 2.0
    assert written['header']['complete'] is True
    out = capsys.readouterr().out
    assert out.endswith(f'\nWrote {tmp_path / "ops_stand-in.json"}.\n')
    assert 'bi_wkv       torch          fwd' in out
    assert '"copy_gb_s"' in out


def test_part_of_a_comparison_names_no_file(with_gpu, capsys, tmp_path):
    out = tmp_path / 'ops.json'
    assert run.main([*TINY, '--impl', 'copy', '--out', str(out), '--part']) == 0
    assert out.exists()
    assert 'Wrote' not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(['--help'])
    assert '--part' not in capsys.readouterr().out


@pytest.fixture
def paced(timer, monkeypatch):
    """A timer whose calls take 3, 2, 1, 2, 2 and 2 ms."""
    milliseconds = iter([3.0, 2.0, 1.0, 2.0, 2.0, 2.0])
    run_once = timer.times

    def times(call, repeats):
        run_once(call, repeats)
        return Timing([next(milliseconds)] * repeats, graph=True)

    monkeypatch.setattr(timer, 'times', times)
    return timer


def test_yardsticks_are_the_fastest_big_copy_and_an_idle_call(paced, monkeypatch):
    """Neither the biggest copy nor the first way is the fastest one by itself."""
    monkeypatch.setattr(run, 'BIG_COPIES', (2**24, 2**26, 2**32))
    free = 2**27
    yardsticks = run.yardsticks(paced, 4, free)
    assert paced.ran == 5  # two of 64 MiB, which is also all that may be taken of 4 GiB
    assert yardsticks == {
        'copies': {'copy 0.02': 5.6, 'kernel 0.02': 8.4, 'copy 0.06': 67.1, 'kernel 0.06': 33.6},
        'copy_gb_s': 67.1,
        'copy_gib': 0.06,
        'copy_way': 'copy',
        'floor_ms': 2.0,
    }


def test_yardstick_may_be_a_kernel_on_a_smaller_copy(paced, monkeypatch):
    monkeypatch.setattr(run, 'BIG_COPIES', (2**24, 2**25))
    paced.times(lambda: None, 2)  # so that the kernel on the smaller one takes 1 ms
    yardsticks = run.yardsticks(paced, 4, 2**30)
    assert yardsticks['copy_way'] == 'kernel'
    assert yardsticks['copy_gb_s'] == round(2**24 / 1e-3 / 1e9, 1)


def test_yardsticks_leave_no_buffers(timer, monkeypatch):
    buffers = []
    seen = []

    def ways(total, device):
        source = torch.zeros(total)
        buffers.append(weakref.ref(source))
        return {'copy': lambda: source.sum()}

    monkeypatch.setattr(run, 'ways_to_copy', ways)
    monkeypatch.setattr(run, 'BIG_COPIES', (8, 16))
    monkeypatch.setattr(timer, 'release', lambda: seen.append([each() for each in buffers]))
    run.yardsticks(timer, 2, 2**20)
    assert seen == [[None], [None, None]]


@pytest.mark.parametrize('total', [1, 4096])
def test_both_ways_to_copy_move_all_bytes(total):
    ways = passes.ways_to_copy(total, 'cpu')
    assert list(ways) == ['copy', 'kernel']
    target, negative = (call() for call in ways.values())
    assert target is negative  # into one buffer
    assert 2 * target.nbytes == max(total, 8)
    target = ways['copy']().clone()
    assert torch.equal(ways['kernel'](), -target)
    assert total == 1 or target.unique().numel() > 1


def test_failure_of_ours_is_the_exit_status(with_gpu, monkeypatch, tmp_path):
    def broken(*_arguments, backend):
        raise ValueError('broken')

    monkeypatch.setattr('linvis_ops.bi_wkv', broken)
    out = tmp_path / 'ops.json'
    assert run.main([*TINY, '--impl', 'torch', 'copy', '--out', str(out)]) == 1
    written = results.read(out)
    assert [row['impl'] for row in written['rows']] == ['copy']
    assert [row['reason'] for row in written['left_out']] == ['ValueError: broken']


def test_stopped_run_keeps_its_rows(with_gpu, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / 'ops.json'
    monkeypatch.setattr('benchmarks.passes.Copies.call', stop)
    yardsticks = {'copies': {}, 'copy_gb_s': 1.0, 'copy_gib': 1.0, 'copy_way': 'copy'}
    monkeypatch.setattr(run, 'yardsticks', lambda *_: {**yardsticks, 'floor_ms': 1.0})
    with pytest.raises(KeyboardInterrupt):
        run.main([*TINY, '--impl', 'torch', 'copy', '--out', str(out)])
    assert [row['impl'] for row in results.read(out)['rows']] == ['torch']
    assert results.read(out)['header']['complete'] is False


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--op', 'wkv'], "run.py: there is no operator 'wkv'; there are bi_wkv"),
        (['--impl', 'opencl'], "run.py: there is no implementation 'opencl'"),
        (['--op', 'bi_wkv', '--shape', '1x2'], 'run.py: the shape 1x2 fits no operator'),
        (['--ops', '/nowhere'], 'run.py: /nowhere has no package linvis_ops.'),
        (['--compare', 'no-such-version'], "'no-such-version' is neither a commit nor a folder"),
    ],
)
@pytest.mark.parametrize('gpu', [True, False], ids=['gpu', 'no-gpu'])
def test_wrong_names_are_told_in_one_sentence(monkeypatch, capsys, arguments, message, gpu):
    monkeypatch.setattr(run, 'has_gpu', lambda: gpu)
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    'arguments',
    [['--shape', '2x0'], ['--shape', 'a'], ['--repeats', '0'], ['--dtype', 'int8'], ['--qui']],
)
def test_malformed_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('run.py: ')
    assert arguments[0] in error
    assert error.endswith('; --help lists the options.\n')
    assert error.count('\n') == 1


def test_places_of_results_are_looked_at_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, 'selected', lambda _: pytest.fail('went on'))
    for program, start in ((run, 'run.py'), (verify, 'verify.py')):
        with pytest.raises(SystemExit) as ended:
            program.main(['--out', str(tmp_path / 'nowhere' / 'ops.json')])
        assert ended.value.code == 2
        told = f'{start}: argument --out: there is no folder {tmp_path / "nowhere"}; make it first'
        assert capsys.readouterr().err == f'{told}; --help lists the options.\n'


@pytest.mark.parametrize('check', [command_line.out_file, command_line.out_file_or_folder])
def test_file_that_can_be_written_is_left_as_it_is(check, tmp_path):
    new, old = tmp_path / 'new.json', tmp_path / 'old.json'
    old.write_text('kept')
    assert check(str(new)) == new
    assert check(str(old)) == old
    assert old.read_text() == 'kept'
    assert list(tmp_path.iterdir()) == [old]


def test_folders_are_places_for_named_files_only(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match='got nothing'):
        command_line.out_file_or_folder('')
    assert command_line.out_file_or_folder(str(tmp_path)) == tmp_path
    assert command_line.out_file_or_folder(f'{tmp_path}/') == tmp_path
    for text in (str(tmp_path), f'{tmp_path}/', f'{tmp_path}/nowhere/'):
        with pytest.raises(argparse.ArgumentTypeError, match=f"a file, got the folder '{text}'"):
            command_line.out_file(text)
    with pytest.raises(argparse.ArgumentTypeError, match='nowhere; make it first'):
        command_line.out_file_or_folder(f'{tmp_path}/nowhere/')


@pytest.mark.parametrize('check', [command_line.out_file, command_line.out_file_or_folder])
def test_places_without_permission_are_told(check, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')

    old = tmp_path / 'old.json'
    old.write_text('')
    monkeypatch.setattr('tempfile.TemporaryFile', refuse)
    monkeypatch.setattr(Path, 'open', refuse)
    for file in (old, tmp_path / 'new.json'):
        told = f'{file} cannot be written: Permission denied'
        with pytest.raises(argparse.ArgumentTypeError, match=told):
            check(str(file))
    if check is command_line.out_file_or_folder:
        with pytest.raises(argparse.ArgumentTypeError, match=f'{tmp_path} cannot be written'):
            check(str(tmp_path))


def test_recorded_command_holds_no_paths(tmp_path):
    places = ['--out', str(tmp_path / 'x.json'), '--ops=/home/me', '--commit', 'abc', '--part']
    typed = [*places[:2], *TINY, *places[2:], '--quick']
    assert run.measuring_arguments(typed) == [*TINY, '--quick']


def test_quick_runs_repeat_less(with_gpu, tmp_path):
    arguments = [*TINY, '--impl', 'copy', '--out', str(tmp_path / 'ops.json')]
    repeats = []
    for more in ([], ['--quick'], ['--quick', '--repeats', '3']):
        assert run.main([*arguments, *more]) == 0
        repeats.append(results.read(tmp_path / 'ops.json')['rows'][0]['repeats'])
    assert repeats == [200, 20, 3]


def test_operators_come_from_the_folder_that_is_named(tmp_path):
    """In a process of its own: here linvis_ops is imported already."""
    package = tmp_path / 'linvis_ops'
    package.mkdir()
    (package / '__init__.py').write_text('')
    program = (
        'import sys; from pathlib import Path; from benchmarks import run;'
        'run.use_operators(Path(sys.argv[1])); import linvis_ops; print(linvis_ops.__file__)'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)],
        cwd=ROOT / 'ops',
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == package / '__init__.py'
    with pytest.raises(ValueError, match=r'linvis_ops was imported from .* before, not from'):
        run.use_operators(tmp_path)


def test_red_tests_stop_the_measurement(with_gpu, monkeypatch, capsys):
    tested = []
    monkeypatch.setattr(verify, 'passed', lambda files: tested.append(files))  # None: not passed
    monkeypatch.setattr(run, 'main', lambda *_: pytest.fail('measured'))
    assert verify.main(['--op', 'bi_wkv', 'q_shift']) == 1
    kinds = (
        'bi_wkv', 'bi_wkv_cuda', 'bi_wkv_gpu', 'bi_wkv_stream', 'bi_wkv_stream_backward'
    )  # fmt: skip
    shared = ('operators_on_gpu', 'triton_sum')
    assert tested == [[f'tests/ops/test_{name}.py' for name in (*kinds, *shared, 'q_shift')]]
    assert 'Nothing is measured' in capsys.readouterr().err


def test_green_tests_let_it_measure(with_gpu, monkeypatch):
    measured = []
    monkeypatch.setattr(verify, 'passed', lambda files: True)
    monkeypatch.setattr(run, 'main', lambda *call: measured.append(call) or 0)
    assert verify.main(['--op', 'bi_wkv', '--quick']) == 0
    assert measured == [(['--op', 'bi_wkv', '--quick'], 'verify.py')]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--op', 'wkv'], "verify.py: there is no operator 'wkv'"),
        (['--op', 'bi_wkv', '--shape', '1x2'], 'verify.py: the shape 1x2 fits no operator'),
        (['--compare', 'no-such-version'], "'no-such-version' is neither a commit nor a folder"),
        (['--ops', '/other'], '--ops is for run.py'),
    ],
)
@pytest.mark.parametrize('gpu', [True, False], ids=['gpu', 'no-gpu'])
def test_verify_refuses_what_it_cannot_measure(monkeypatch, capsys, arguments, message, gpu):
    monkeypatch.setattr(run, 'has_gpu', lambda: gpu)
    monkeypatch.setattr(verify, 'passed', lambda files: pytest.fail('tested'))
    assert verify.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_help_of_verify_is_its_own(capsys):
    with pytest.raises(SystemExit) as ended:
        verify.main(['--help'])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith('usage: verify.py ')
    assert 'Run the GPU tests of the operators first' in printed


@pytest.mark.parametrize(
    ('body', 'green'),
    [('pass', True), ('assert False', False), ('pytest.skip("no extension")', False)],
)
def test_green_is_that_gpu_tests_were_run_and_passed(tmp_path, body, green):
    file = tmp_path / 'test_operator.py'
    file.write_text(f'import pytest\n\n@pytest.mark.gpu\ndef test_it(): {body}\n')
    assert verify.passed([str(file)]) is green


def test_no_gpu_tests_are_no_green(tmp_path):
    file = tmp_path / 'test_operator.py'
    file.write_text('def test_it(): pass\n')
    assert not verify.passed([str(file)])


@pytest.mark.gpu
def test_run_on_a_gpu(tmp_path):
    out = tmp_path / 'ops.json'
    assert run.main(['--op', 'bi_wkv', '--quick', '--repeats', '5', '--out', str(out)]) == 0
    written = results.read(out)
    rows = {(row['impl'], row['pass']): row for row in written['rows']}
    for pass_name in ('fwd', 'bwd', 'fwd+bwd'):
        triton = rows['triton', pass_name]
        assert triton['graph']
        assert triton['ms'] > rows['copy', pass_name]['ms'] / 2
        assert triton['peak_mib'] * 2**20 > triton['least_bytes'] / 2
    assert written['header']['copy_gb_s'] > 100
