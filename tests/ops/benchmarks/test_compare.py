"""Two versions of the operators: checkouts, ratios, what is run."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, results


def git(folder, *arguments):
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
    done = subprocess.run(
        ['git', '-C', str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits, in which ops/linvis_ops/version.txt holds 1 and 2."""
    top = tmp_path / 'repository'
    (top / 'ops' / 'linvis_ops').mkdir(parents=True)
    (top / 'ops' / 'benchmarks').mkdir()
    git(tmp_path, 'init', '--quiet', str(top))
    for version in ('1', '2'):
        (top / 'ops' / 'linvis_ops' / 'version.txt').write_text(version)
        git(top, 'add', '.')
        git(top, 'commit', '--quiet', '-m', version)
    monkeypatch.setattr(compare, 'RUN', top / 'ops' / 'benchmarks' / 'run.py')
    return top


def test_commit_is_checked_out_for_a_while(repository, tmp_path):
    with compare.other_checkout('HEAD~1', tmp_path / 'other') as ops:
        assert (ops / 'linvis_ops' / 'version.txt').read_text() == '1'
        assert (repository / 'ops' / 'linvis_ops' / 'version.txt').read_text() == '2'
    assert not (tmp_path / 'other').exists()
    assert len(git(repository, 'worktree', 'list').splitlines()) == 1


def test_checkout_goes_away_after_an_error(repository, tmp_path):
    with pytest.raises(KeyError), compare.other_checkout('HEAD', tmp_path / 'other'):
        raise KeyError
    assert len(git(repository, 'worktree', 'list').splitlines()) == 1


def test_folder_is_a_version_too(tmp_path):
    (tmp_path / 'ops' / 'linvis_ops').mkdir(parents=True)
    with compare.other_checkout(str(tmp_path), tmp_path / 'other') as ops:
        assert ops == tmp_path / 'ops'


def test_unknown_version_is_refused(repository, tmp_path):
    with (
        pytest.raises(ValueError, match="'HEAD~9' is neither a commit nor a folder"),
        compare.other_checkout('HEAD~9', tmp_path / 'other'),
    ):
        pass


def test_folder_without_the_operators_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f'--compare: the folder {tmp_path} has no ops/linvis_ops'):
        compare.check(str(tmp_path))


def test_program_says_which_one_to_use(tmp_path):
    command = [sys.executable, compare.__file__]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == (
        'compare.py is a part of run.py: use python ops/benchmarks/run.py --compare COMMIT.\n'
    )


def test_table_has_ratios_and_says_what_one_version_lacks(make_row, make_results):
    before = make_results(
        [make_row('triton', (16, 4096, 192), 1.5), make_row('torch', (16, 4096, 192), 3.0)],
        commit='a' * 40,
        copy_gb_s=990.0,
    )
    now = make_results(
        [
            make_row('triton', (16, 4096, 192), 0.6),
            make_row('triton', (16, 4096, 192), 0.9, pass_name='bwd'),
        ],
        dirty=True,
    )
    lines = compare.table(before, now, 'HEAD~1').splitlines()
    assert lines[0] == f'before: HEAD~1, {"a" * 10}, copy 990 GB/s on NVIDIA Stand-in 80GB HBM3'
    assert 'with uncommitted changes, copy 1000 GB/s' in lines[1]
    cells = [line.split() for line in lines[3:]]
    shape = ['bfloat16', 'B16-T4096-C192']
    assert cells == [
        ['bi_wkv', 'triton', 'fwd', *shape, '1.5000', '0.6000', '2.50x'],
        ['bi_wkv', 'torch', 'fwd', *shape, '3.0000', '-', '-'],
        ['bi_wkv', 'triton', 'bwd', *shape, '-', '0.9000', '-'],
    ]


@pytest.fixture
def measured(monkeypatch, make_row, make_results):
    """Stand-in for both measurements; records them."""
    calls = []

    def stand_in(ops, arguments, out):
        calls.append((ops, list(arguments)))
        return make_results([make_row('triton', (1, 2, 64), 4.0 / len(calls))])

    monkeypatch.setattr(compare, 'measured', stand_in)
    return calls


def arguments(tmp_path, **fields):
    (tmp_path / 'ops' / 'linvis_ops').mkdir(parents=True)
    known = {'compare': str(tmp_path), 'ops': Path('here'), 'impl': [], 'out': None}
    return argparse.Namespace(**{**known, **fields})


def test_other_version_is_measured_first_and_alike(measured, tmp_path, capsys):
    assert compare.main(arguments(tmp_path), ['--op', 'bi_wkv']) == 0
    same = ['--op', 'bi_wkv', '--impl', 'ours']
    assert measured == [(tmp_path / 'ops', same), (Path('here'), same)]
    assert capsys.readouterr().out.splitlines()[-1].endswith('4.0000      2.0000       2.00x')


def test_named_implementations_are_kept(measured, tmp_path, capsys):
    args = arguments(tmp_path, impl=['torch'], out=tmp_path / 'now.json')
    assert compare.main(args, ['--impl', 'torch']) == 0
    assert measured[0][1] == ['--impl', 'torch']
    assert results.read(tmp_path / 'now.json')['rows'][0]['ms'] == 2.0
    assert capsys.readouterr().out.endswith(f'\nWrote {tmp_path / "now.json"}.\n')


def test_measurement_that_wrote_nothing_is_an_error(monkeypatch, tmp_path, capfd):
    script = tmp_path / 'run.py'
    script.write_text('import sys; print(sys.argv[1:])')
    monkeypatch.setattr(compare, 'RUN', script)
    with pytest.raises(ValueError, match='could not be measured'):
        compare.measured(Path('somewhere'), ['--quick'], tmp_path / 'out.json')
    out = ['--quick', '--ops', 'somewhere', '--out', str(tmp_path / 'out.json'), '--part']
    assert str(out) in capfd.readouterr().out
