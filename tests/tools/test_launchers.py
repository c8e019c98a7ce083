"""The shell launchers, with stand-ins for torchrun's work and for Slurm's commands."""

import os
import re
import subprocess
from pathlib import Path

import pytest

# Writes its arguments and environment, then runs the command behind the options.
FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > srun_args
env > srun_env
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
echo "$@" > scontrol_args
printf 'node7\\nnode8\\n'
"""
FAKE_PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 23456; exit; fi
printf '%s\\n' "$@" > python_args
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder first on PATH with the stand-ins; commands run in tmp_path."""
    bin_dir = tmp_path / 'bin'
    bin_dir.mkdir()
    programs = {'srun': FAKE_SRUN, 'scontrol': FAKE_SCONTROL, 'python': FAKE_PYTHON}
    for name, text in programs.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith('SLURM_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('PATH', f'{bin_dir}:{os.environ["PATH"]}')
    return tmp_path


def run(script: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ['bash', str(script), *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_dist_train_takes_a_free_port_and_passes_options(project, fake):
    done = run(project / 'tools/dist_train.sh', 'my config.py', '2', '--resume', '--amp')
    assert done.returncode == 0, done.stderr
    arguments = lines(fake / 'python_args')
    assert arguments[:2] == ['-m', 'torch.distributed.run']
    assert {'--nproc_per_node=2', '--nnodes=1', '--master_port=23456'} <= set(arguments)
    script = str(project / 'tools/train.py')
    assert arguments[arguments.index(script) :] == [
        script,
        'my config.py',
        '--launcher',
        'pytorch',
        '--resume',
        '--amp',
    ]


def test_dist_test_of_several_nodes_reads_the_environment(project, fake):
    environ = {'NNODES': '2', 'NODE_RANK': '1', 'MASTER_ADDR': 'first'}
    done = run(project / 'tools/dist_test.sh', 'c.py', 'a.pth', '8', **environ)
    assert done.returncode == 0, done.stderr
    arguments = lines(fake / 'python_args')
    expected = {'--nnodes=2', '--node_rank=1', '--master_addr=first', '--master_port=29500'}
    assert expected <= set(arguments)
    assert arguments[-4:] == ['c.py', 'a.pth', '--launcher', 'pytorch']


@pytest.mark.parametrize(
    ('script', 'arguments', 'expected'),
    [
        ('dist_train.sh', ['c.py'], 'usage: bash tools/dist_train.sh CONFIG GPUS'),
        ('dist_train.sh', ['c.py', 'two'], "GPUS must be a positive number, got 'two'"),
        ('dist_test.sh', ['c.py', '2'], 'usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS'),
        ('slurm_train.sh', [], 'tools/slurm_train.sh CONFIG'),
        ('slurm_test.sh', ['c.py'], 'tools/slurm_test.sh CONFIG CHECKPOINT'),
    ],
)
def test_wrong_arguments_are_told(project, fake, script, arguments, expected):
    done = run(project / 'tools' / script, *arguments)
    assert done.returncode == 2
    assert expected in done.stderr


def test_slurm_direct_run_asks_for_the_gpus(project, fake):
    environ = {
        'PARTITION': 'gpu',
        'GPUS': '16',
        'CPUS_PER_TASK': '4',
        'SRUN_ARGS': '--nodelist=a --qos=b',
    }
    done = run(project / 'tools/slurm_train.sh', 'c.py', '--resume', **environ)
    assert done.returncode == 0, done.stderr
    arguments = lines(fake / 'srun_args')
    expected = {'--nodes=2', '--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8', '--qos=b'}
    assert expected | {'--partition=gpu', '--cpus-per-task=4', '--nodelist=a'} <= set(arguments)
    assert '--kill-on-bad-exit=1' not in arguments
    assert arguments[-5:] == [
        str(project / 'tools/train.py'),
        'c.py',
        '--resume',
        '--launcher',
        'slurm',
    ]


def test_slurm_direct_run_refuses_uneven_nodes(project, fake):
    done = run(project / 'tools/slurm_train.sh', 'c.py', GPUS='12', GPUS_PER_NODE='8')
    assert done.returncode == 2
    assert 'GPUS (12) must be a multiple of GPUS_PER_NODE (8)' in done.stderr


def test_without_slurm_the_other_launchers_are_named(project, fake):
    (fake / 'bin/srun').unlink()
    done = run(project / 'tools/slurm_train.sh', 'c.py', PATH=f'{fake / "bin"}:/usr/bin:/bin')
    assert done.returncode == 2
    assert 'srun is not there' in done.stderr
    assert 'tools/dist_train.sh' in done.stderr


def test_sbatch_takes_all_from_the_allocation(project, fake):
    # sbatch runs a copy of the script from its spool folder.
    spooled = fake / 'spool' / 'slurm_script'
    spooled.parent.mkdir()
    spooled.write_text((project / 'tools/slurm_train.sh').read_text())
    allocation = {
        'SLURM_JOB_ID': '70001',
        'SLURM_JOB_NUM_NODES': '2',
        'SLURM_GPUS_ON_NODE': '4',
        'SLURM_CPUS_PER_TASK': '6',
        'SLURM_JOB_NODELIST': 'node[7-8]',
        'SLURM_SUBMIT_DIR': str(project),
    }
    done = run(spooled, 'c.py', '--amp', **allocation)
    assert done.returncode == 0, done.stderr
    arguments = lines(fake / 'srun_args')
    expected = {'--nodes=2', '--ntasks=8', '--ntasks-per-node=4', '--cpus-per-task=6'}
    assert expected <= set(arguments)
    assert lines(fake / 'scontrol_args') == ['show hostnames node[7-8]']
    environ = dict(line.partition('=')[::2] for line in lines(fake / 'srun_env'))
    assert environ['MASTER_ADDR'] == 'node7'
    assert environ['MASTER_PORT'] == str(20000 + 70001 % 20000)
    assert str(project) in environ['PYTHONPATH'].split(':')
    assert arguments[-4:] == ['c.py', '--amp', '--launcher', 'slurm']


def test_sbatch_elsewhere_says_where_to_call_it(project, fake):
    spooled = fake / 'slurm_script'
    spooled.write_text((project / 'tools/slurm_test.sh').read_text())
    done = run(spooled, 'c.py', 'a.pth', SLURM_JOB_ID='1', SLURM_SUBMIT_DIR=str(fake))
    assert done.returncode == 2
    assert 'call sbatch at the top of the checkout' in done.stderr


def test_batch_script_asks_for_the_signal_before_the_time_limit(project):
    text = (project / 'tools/slurm_train.sh').read_text()
    assert re.search(r'^#SBATCH --signal=USR1@\d+$', text, re.MULTILINE)
