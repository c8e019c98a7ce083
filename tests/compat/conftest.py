import os
import subprocess
import sys
from pathlib import Path

import pytest

from linvis.compat import install

ROOT = Path(__file__).parents[2]


# The test modules import mmcv.ops when they are collected.
install()


@pytest.fixture(scope='session')
def run_python():
    """Run code in a fresh interpreter that sees this checkout; return what it prints."""

    def run(code, *arguments, path=()):
        entries = [*map(str, path), str(ROOT), str(ROOT / 'ops')]
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code, *map(str, arguments)],
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(entries), 'OMP_NUM_THREADS': '1'},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
