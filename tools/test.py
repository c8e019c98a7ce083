"""Tests a checkpoint: python tools/test.py CONFIG CHECKPOINT [--help]."""

import sys

try:
    from linvis.cli import main_test
except ModuleNotFoundError as error:
    sys.exit(f'{error} in {sys.executable}: activate the environment, as the README says.')

if __name__ == '__main__':
    sys.exit(main_test())
