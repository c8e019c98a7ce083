import subprocess

import pytest
import torch

from benchmarks import sanitize
from benchmarks.registry import OPERATORS, named


@pytest.fixture
def commands(monkeypatch):
    """Commands that were run; those of compute-sanitizer end with the status of `found`."""
    ran = []

    def call(command, env=None, check=True):
        ran.append((command, env))
        status = 3 if 'racecheck' in command else 0
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr('benchmarks.run.has_gpu', lambda: True)
    monkeypatch.setattr(sanitize.shutil, 'which', lambda name: f'/bin/{name}')
    monkeypatch.setattr(sanitize.subprocess, 'run', call)
    return ran


def test_every_operator_has_shapes():
    assert {operator.name for operator in OPERATORS} == set(sanitize.SHAPES)
    for operator in OPERATORS:
        assert all(len(sizes) == len(operator.axes) for sizes in sanitize.SHAPES[operator.name])


@pytest.mark.parametrize('name', ['q_shift', 'q_shift_mix', 'q_shift_mix_norm'])
@pytest.mark.parametrize('shift', sanitize.SHIFTS)
def test_shifts_with_class_tokens_and_heads(name, shift):
    (operator,) = named([name])
    call = sanitize.shifted(operator, *shift, torch.float32, 'cpu', 'torch').call('fwd+bwd')
    outputs = call.run()
    assert outputs[0].shape == (2, 7 * 9 + shift[0], shift[2])  # the gradient by the tokens


def test_clean_kernels(commands):
    assert sanitize.main(['--op', 'q_shift', '--tool', 'memcheck', 'initcheck']) == 0
    (warm, none), (memcheck, environment), (initcheck, _) = commands
    assert warm[2:] == ['--here', '--op', 'q_shift']
    assert none is None
    assert memcheck[:5] == ['compute-sanitizer', '--tool', 'memcheck', '--error-exitcode', '3']
    assert memcheck[5:] == warm
    assert environment['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'
    assert initcheck[2] == 'initcheck'


def test_what_a_tool_finds_is_a_failure(commands):
    assert sanitize.main([]) == 1
    assert [command[2] for command, _ in commands[1:]] == list(sanitize.TOOLS)


def test_missing_gpu_and_missing_tool_are_told(monkeypatch, commands, capsys):
    monkeypatch.setattr(sanitize.shutil, 'which', lambda name: None)
    assert sanitize.main([]) == 2
    assert 'compute-sanitizer is not on the PATH' in capsys.readouterr().err
    monkeypatch.setattr('benchmarks.run.has_gpu', lambda: False)
    assert sanitize.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith('Kernels run under compute-sanitizer on a CUDA GPU, and PyTorch finds')


def test_unknown_names_are_told_in_one_line(capsys):
    for option, name in (('--op', 'wkv'), ('--tool', 'synccheck')):
        with pytest.raises(SystemExit) as ended:
            sanitize.main([option, name])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sanitize.py: argument {option}: invalid choice: '{name}'")
        assert error.count('\n') == 1


def test_operators_that_do_not_run_are_no_findings(monkeypatch, commands, capsys):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(sanitize.subprocess, 'run', lambda *_, **__: failed)
    assert sanitize.main([]) == 2
    assert 'do not run, even without compute-sanitizer' in capsys.readouterr().err
