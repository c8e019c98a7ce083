"""Files that a program is to write, checked before it starts to work."""

import tempfile
from pathlib import Path

from linvis.engine.errors import LaunchError


def out_file(text: str, *, make_folder: bool = False) -> Path:
    """The file that --out names, whether it exists or not.

    Args:
        text: What the command line says.
        make_folder: Make its folder if there is none.

    Raises:
        LaunchError: If it is a folder, or cannot be written.
    """
    path = Path(text)
    try:
        if not text:
            raise LaunchError('--out must name a file, got nothing.')
        if text.endswith('/') or path.is_dir():
            raise LaunchError(f'--out must name a file, got the folder {text}.')
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.is_dir():
            raise LaunchError(f'--out {text}: there is no folder {path.parent}; make it first.')
        if path.exists():
            path.open('ab').close()
        else:  # permissions alone do not tell it
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise LaunchError(f'--out {text} cannot be written: {error.strerror}.') from None
    return path
