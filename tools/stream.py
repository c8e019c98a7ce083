"""Takes a picture in bands: python tools/stream.py CONFIG CHECKPOINT PICTURE [--help]."""

import sys

try:
    from linvis.cli import main_stream
except ModuleNotFoundError as error:
    sys.exit(f'{error} in {sys.executable}: activate the environment, as the README says.')

if __name__ == '__main__':
    sys.exit(main_stream())
