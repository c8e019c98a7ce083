"""Trains a model: python tools/train.py CONFIG [--help]."""

import sys

from linvis.cli import main_train

if __name__ == '__main__':
    sys.exit(main_train())
