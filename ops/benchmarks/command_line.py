"""What the command lines of programs that measure share: all is checked before anything runs."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, without all the options before it."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f'{self.prog}: {message}; --help lists the options.\n')


def sizes(text: str) -> tuple[int, ...]:
    """Sizes of a shape written as 128x196x192."""
    parts = text.split('x')
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f'expected sizes such as 128x196x192, got {text!r}')
    return tuple(int(part) for part in parts)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f'expected a whole number from 1 on, got {text!r}')
    return int(text)


def out_file(text: str) -> Path:
    """A file that can be written, whether it exists or not; its folder has to."""
    path = Path(text)
    try:
        if text.endswith('/') or path.is_dir():
            raise argparse.ArgumentTypeError(f'expected a file, got the folder {text!r}')
        _check_folder(path.parent)
        if path.exists():
            path.open('ab').close()
        else:
            _try_folder(path.parent)
    except OSError as error:
        raise argparse.ArgumentTypeError(f'{text} cannot be written: {error.strerror}') from None
    return path


def out_file_or_folder(text: str) -> Path:
    """As `out_file`, or a folder into which files can be written; with a slash behind, only that.

    What is a folder exists, so `Path.is_dir` tells which of the two it is.
    """
    if not text:
        raise argparse.ArgumentTypeError('expected a file or a folder, got nothing')
    path = Path(text)
    try:
        if not text.endswith('/') and not path.is_dir():
            return out_file(text)
        _check_folder(path)
        _try_folder(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f'{text} cannot be written: {error.strerror}') from None
    return path


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f'there is no folder {folder}; make it first')


def _try_folder(folder: Path) -> None:
    """Raise OSError unless a file can be made in a folder: permissions alone do not tell it."""
    tempfile.TemporaryFile(dir=folder).close()


def no_gpu(what: str) -> str:
    """The sentence for a machine without a GPU; `what` needs one, as in 'Operators are measured'.

    It names the program that tells more.
    """
    return (
        f'{what} on a CUDA GPU, and PyTorch finds none; `python tools/env_report.py` says what it '
        'does find.'
    )


def complain(message: str) -> int:
    """Print one sentence to stderr; returns the exit status of what cannot be measured."""
    print(message, file=sys.stderr)
    return 2


def say_written(path: Path) -> None:
    """Say at the end where the results are."""
    print(f'Wrote {path}.')
