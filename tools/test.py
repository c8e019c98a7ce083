"""Tests a checkpoint: python tools/test.py CONFIG CHECKPOINT [--help]."""

import sys

from linvis.cli import main_test

if __name__ == '__main__':
    sys.exit(main_test())
