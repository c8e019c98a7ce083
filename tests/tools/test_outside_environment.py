"""Commands of the tools that are called with an interpreter that has no linvis."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize('tool', ['train', 'test', 'stream', 'env_report', 'verify_data'])
def test_tool_without_its_environment_says_what_to_activate(project, tool):
    # isolated, without site-packages
    command = [sys.executable, '-I', '-S', str(project / 'tools' / f'{tool}.py'), '--help']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"No module named 'linvis' in {sys.executable}: activate the environment, as the README "
        'says.\n'
    )
