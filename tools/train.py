"""Trains a model: python tools/train.py CONFIG [--help]."""

import sys

try:
    from linvis.cli import main_train
except ModuleNotFoundError as error:
    sys.exit(f'{error} in {sys.executable}: activate the environment, as the README says.')

if __name__ == '__main__':
    sys.exit(main_train())
