"""Layout of measured results: a header, rows, and what was left out with the reason."""

import argparse
import json
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

Row = dict[str, Any]

# What identifies a row; `shape` is a dict of sizes by axis.
KEYS = ('op', 'impl', 'pass', 'dtype', 'shape')
ROW_FIELDS = (
    *KEYS,
    'ours',  # whether it is an implementation of ours
    'tokens',  # T
    'elements',  # of one tensor of tokens
    'least_bytes',  # that the pass has to read and write
    'ms',  # median
    'ms_10',  # 10 % of the repetitions were below
    'ms_90',
    'repeats',
    'gb_s',  # least_bytes over the median
    'copy_share',  # gb_s over the header's copy_gb_s
    'peak_mib',  # inputs, outputs and all that is allocated between
    'graph',  # whether a CUDA graph was replayed
    'call',  # what ran: forward, autograd, copy_ or a registered operator
    'note',  # why there was no graph, or None
)
LEFT_OUT_FIELDS = (*KEYS, 'reason', 'failed')
HEADER_FIELDS = (
    'gpu',
    'capability',
    'memory_gib',
    'l2_mib',
    'driver',
    'cuda',
    'torch',
    'triton',
    'python',
    'date',
    'commit',
    'dirty',  # whether linvis_ops had changes that are in no commit
    'command',
    'copies',  # speed of each big copy at the beginning, by its way and its GiB read and written
    'copy_gb_s',  # of the fastest copy: one of those, or one of the rows
    'copy_gib',  # bytes read plus bytes written of that one
    'copy_way',  # of that one: copy, which is Tensor.copy_, or kernel, an element-wise one
    'floor_ms',  # what a call takes that writes one number
    'flush_mib',
    'complete',  # whether the run came to its end
)
# Files of before are read without these.
LATER_HEADER_FIELDS = frozenset(('copies', 'copy_way', 'complete'))


class Measured(Protocol):
    """What a run has gathered."""

    rows: list[Row]
    left_out: list[Row]


def key(row: Row) -> tuple[Any, ...]:
    """What identifies a row among others, hashable."""
    return tuple(tuple(row[k].items()) if k == 'shape' else row[k] for k in KEYS)


def shape_text(shape: dict[str, int]) -> str:
    """Shape in one word, e.g. B128-T196-C192."""
    return '-'.join(f'{axis}{size}' for axis, size in shape.items())


def gpu_slug(name: str) -> str:
    """Name of a GPU in file names: 'NVIDIA H100 80GB HBM3' is h100."""
    words = [
        word
        for word in re.sub(r'[^a-z0-9]+', ' ', name.lower()).split()
        if not re.fullmatch(r'nvidia|\d+gb|hbm\d*e?', word)
    ]
    return '-'.join(words) or 'gpu'


def row_text(row: Row) -> str:
    """A row as one line."""
    return (
        f'{row["op"]:12} {row["impl"]:14} {row["pass"]:8} {row["dtype"]:9} '
        f'{shape_text(row["shape"]):26} {row["ms"]:10.4f} ms '
        f'({row["ms_10"]:.4f} to {row["ms_90"]:.4f}) {row["gb_s"]:8.1f} GB/s '
        f'{row["copy_share"]:6.1%} of copy {row["peak_mib"]:9.1f} MiB'
        + ('' if row['graph'] else f'  [no graph: {row["note"]}]')
    )


def git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git cannot tell."""
    if shutil.which('git') is None:
        return None
    done = subprocess.run(
        ['git', '-C', str(folder), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    if shutil.which('nvidia-smi') is None:
        return None
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split('\n')[0].strip() or None if done.returncode == 0 else None


def _triton() -> str | None:
    try:
        return metadata.version('triton')
    except metadata.PackageNotFoundError:
        return None


def command(program: str, arguments: Sequence[str]) -> str:
    """What was typed, without the options that say where the results go and of which commit."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ('--out', '--commit'):
        places.add_argument(option)
    return shlex.join(['python', program, *places.parse_known_args(list(arguments))[1]])


def make_header(ops: Path, command: str, commit: str | None, **measured: Any) -> Row:
    """Header of a run on the current CUDA device.

    Args:
        ops: Folder of the linvis_ops that is measured.
        command: What was typed.
        commit: Commit of linvis_ops; None: as git says.
        measured: Further fields: what was measured, and how far the run came.
    """
    properties = torch.cuda.get_device_properties('cuda')
    # a commit that is given is not that of the files around this one
    status = None if commit else git(ops, 'status', '--porcelain', '--', 'linvis_ops')
    return {
        'gpu': properties.name,
        'capability': f'{properties.major}.{properties.minor}',
        'memory_gib': round(properties.total_memory / 2**30, 1),
        'l2_mib': round(properties.L2_cache_size / 2**20, 1),
        'driver': _driver(),
        'cuda': torch.version.cuda,
        'torch': torch.__version__,
        'triton': _triton(),
        'python': platform.python_version(),
        'date': datetime.now(timezone.utc).date().isoformat(),
        'commit': commit or git(ops, 'rev-parse', 'HEAD'),
        'dirty': None if status is None else bool(status),
        'command': command,
        **measured,
    }


def check(results: dict[str, Any]) -> None:
    """Raise ValueError unless results have the layout of this module."""
    if sorted(results) != ['header', 'left_out', 'rows']:
        raise ValueError(f'results have header, rows and left_out, got {", ".join(results)}.')
    groups = (
        ('header', [results['header']], HEADER_FIELDS),
        ('row', results['rows'], ROW_FIELDS),
        ('left out', results['left_out'], LEFT_OUT_FIELDS),
    )
    for what, entries, fields in groups:
        for entry in entries:
            wrong = set(entry) ^ set(fields)
            if what == 'header':
                wrong -= LATER_HEADER_FIELDS - set(entry)
            if wrong:
                names = ', '.join(sorted(wrong))
                raise ValueError(f'{what}: these fields are missing or unknown: {names}.')


def file(path: Path, header: Row) -> Path:
    """The file for results of a run: the path, or ops_GPU.json in it if it is a folder."""
    return path / f'ops_{gpu_slug(header["gpu"])}.json' if path.is_dir() else path


def assemble(header: Row, measured: Measured) -> dict[str, Any]:
    """Results of a run, in the layout of this module.

    Shares are those of the fastest copy of the run, should one of the rows have been faster than
    those that it began with.
    """
    copies = [row for row in measured.rows if row['impl'] == 'copy']
    fastest = max(copies, key=lambda row: row['gb_s'], default=None)
    if fastest and fastest['gb_s'] > header['copy_gb_s']:
        size = round(fastest['least_bytes'] / 2**30, 2)
        found = {'copy_gb_s': fastest['gb_s'], 'copy_gib': size, 'copy_way': 'copy'}
        header = {**header, **found}
    speed = header['copy_gb_s']
    rows = [{**row, 'copy_share': round(row['gb_s'] / speed, 4)} for row in measured.rows]
    return {'header': header, 'rows': rows, 'left_out': measured.left_out}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, one line a row."""
    check(results)

    def lines(rows: Sequence[Row]) -> str:
        return '[\n' + ',\n'.join(json.dumps(row) for row in rows) + '\n]' if rows else '[]'

    header = json.dumps(results['header'], indent=1)
    text = (
        f'{{\n"header": {header},\n"rows": {lines(results["rows"])},\n'
        f'"left_out": {lines(results["left_out"])}\n}}\n'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(path: Path) -> dict[str, Any]:
    """Read results.

    Raises:
        ValueError: If the file has another layout.
    """
    results = json.loads(path.read_text())
    check(results)
    return results
