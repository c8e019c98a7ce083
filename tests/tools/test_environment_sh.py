"""tools/environment.sh with stand-ins for Python, venv and pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# A Python without ensurepip, like Debian's without python3-venv: it writes down its calls, and
# what `-m venv` makes is a link to itself. STAND_IN_FAILS names a call that fails.
PYTHON = """#!/usr/bin/env bash
echo "$(basename "$0"): $*" >> "$CALLS"
[[ -n $STAND_IN_FAILS && "$*" == *"$STAND_IN_FAILS"* ]] && exit 1
case "$*" in
    --version) echo "Python 3.99.0" ;;
    "-c "*) [[ $(basename "$0") != old ]] ;;
    "-m venv --without-pip "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m venv "*) mkdir -p "$3/bin"; echo 'ensurepip is not available' >&2; exit 1 ;;
    "-m pip --python"*) echo 'no such option: --python' >&2; exit 2 ;;  # pip before 22.3
esac
"""
WITH_VENV = PYTHON.replace('"-m venv --without-pip "*', '"-m never"').replace(
    '"-m venv "*) mkdir -p "$3/bin"; echo \'ensurepip is not available\' >&2; exit 1 ;;',
    '"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;',
)


class Checkout:
    """A copy of what the script reads, and a folder of stand-ins that is all of PATH but /bin."""

    def __init__(self, folder: Path, project: Path) -> None:
        self.folder = folder / 'a checkout'
        self.venv = self.folder / '.venv'
        self.bin = folder / 'bin'
        self.calls_file = folder / 'calls'
        (self.folder / 'tools').mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(project / 'tools/environment.sh', self.folder / 'tools')
        shutil.copy(project / 'pyproject.toml', self.folder)
        shutil.copytree(project / 'requirements', self.folder / 'requirements')

    def add(self, name: str, text: str = PYTHON) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, command: str, fails: str = '', **environ: str) -> subprocess.CompletedProcess:
        inherited = {k: v for k, v in os.environ.items() if k not in ('PYTHON', 'VENV')}
        self.calls_file.write_text('')
        return subprocess.run(
            ['bash', '-c', f'set -euo pipefail; source tools/environment.sh; {command}'],
            cwd=self.folder,
            env={
                **inherited,
                'PATH': f'{self.bin}:/usr/bin:/bin',
                'CALLS': str(self.calls_file),
                'STAND_IN_FAILS': fails,
                **environ,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    @property
    def installations(self) -> list[str]:
        """What follows `install` in the calls of the environment's own pip."""
        return [call.partition(' install ')[2] for call in self.calls if ' install ' in call]


@pytest.fixture
def checkout(tmp_path, project):
    return Checkout(tmp_path, project)


def test_python_of_the_environment_comes_first(checkout):
    checkout.add('python3')
    mine = checkout.add('mine')
    assert checkout.run('find_python', PYTHON=str(mine)).stdout == f'{mine}\n'
    assert checkout.run('find_python').stdout == f'{checkout.bin}/python3\n'


def test_a_python_that_is_too_old_is_passed_over(checkout):
    for name in ('python3', 'python3.13', 'python3.12', 'python3.10'):
        checkout.add(name, '#!/usr/bin/env bash\nexit 1\n')
    right = checkout.add('python3.11')
    assert checkout.run('find_python').stdout == f'{right}\n'


def test_the_versions_that_the_project_declares_are_asked_for(checkout):
    checkout.add('python3')
    checkout.run('find_python')
    question = checkout.calls[0].partition('-c ')[2]
    for version, status in [((3, 9), 1), ((3, 10), 0), ((3, 13, 9), 0), ((3, 14), 1)]:
        with pytest.raises(SystemExit) as ended:
            exec(question.replace('sys.version_info', repr(version)), {})  # noqa: S102
        assert int(ended.value.code) == status


def test_no_fitting_python_is_told_in_one_sentence(checkout):
    old = checkout.add('old')
    done = checkout.run('ensure_environment', PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1
    assert f"Python 3.10 to 3.13 is needed and '{old}' is not that; set PYTHON=" in done.stderr


def test_venv_is_made_by_venv_where_it_works(checkout):
    python = checkout.add('python3', WITH_VENV)
    done = checkout.run(f'make_venv {python}')
    assert done.returncode == 0, done.stderr
    assert checkout.calls == [f'python3: -m venv {checkout.venv}']


def test_venv_without_ensurepip_and_with_an_old_pip(checkout):
    python = checkout.add('python3')
    done = checkout.run(f'make_venv {python}')
    assert done.returncode == 0, done.stderr
    assert (checkout.venv / 'bin/python').exists()
    fetch, install = checkout.calls[-2:]
    assert fetch.startswith('python3: -m pip ')
    assert fetch.endswith(' pip')
    folder = Path(fetch.partition('--target ')[2].removesuffix(' pip'))
    assert install.startswith('python: -m pip install ')
    assert not folder.exists()


@pytest.mark.parametrize('fails', ['--without-pip', '--target', '--ignore-installed'])
def test_half_an_environment_does_not_stay(checkout, fails):
    python = checkout.add('python3')
    done = checkout.run(f'make_venv {python}', fails=fails)
    assert done.returncode == 1
    assert f'error: no virtual environment could be made with {python}; install' in done.stderr
    assert not checkout.venv.exists()


def test_second_call_installs_nothing(checkout):
    checkout.add('python3', WITH_VENV)
    done = checkout.run('ensure_environment')
    assert done.returncode == 0, done.stderr
    assert checkout.installations == [
        '-r requirements/lock.txt',
        '--no-deps -r requirements/mm.txt',
        '--quiet --no-deps --editable .',
    ]
    again = checkout.run('ensure_environment')
    assert again.stdout == f'environment: {checkout.venv} is up to date\n'
    assert checkout.calls == []


def test_test_tools_come_on_top_and_include_what_a_run_needs(checkout):
    checkout.add('python3', WITH_VENV)
    checkout.run('ensure_environment')
    checkout.run('ensure_environment tests')
    assert '-r requirements/tests.txt -r requirements/docs.txt' in checkout.installations
    shutil.rmtree(checkout.venv)
    checkout.run('ensure_environment tests')
    assert 'is up to date' in checkout.run('ensure_environment').stdout


def test_changed_requirements_are_installed_into_the_same_environment(checkout):
    checkout.add('python3', WITH_VENV)
    checkout.run('ensure_environment')
    with (checkout.folder / 'requirements/lock.txt').open('a') as file:
        file.write('wheel==1\n')
    assert checkout.run('ensure_environment').returncode == 0
    assert len(checkout.installations) == 3
    assert not any('-m venv' in call for call in checkout.calls)


def test_failed_installation_is_repeated_by_the_next_call(checkout):
    checkout.add('python3', WITH_VENV)
    done = checkout.run('ensure_environment', fails='requirements/mm.txt')
    assert done.returncode == 1
    assert done.stderr.startswith('error: the installation failed;')
    assert not any('--editable' in call for call in checkout.calls)
    assert checkout.run('ensure_environment').returncode == 0
    assert len(checkout.installations) == 3


def test_help_of_the_quickstart_installs_nothing(project, tmp_path):
    venv = tmp_path / 'venv'
    done = subprocess.run(
        ['bash', str(project / 'tools/quickstart.sh'), '--device', 'cpu', '--help'],
        env={**os.environ, 'VENV': str(venv)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert '--tasks' in done.stdout
    assert not venv.exists()
