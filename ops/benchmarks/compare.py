"""Two versions of linvis_ops, measured one after the other by this harness: run.py --compare."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import command_line, results
from benchmarks.results import Row

RUN = Path(__file__).resolve().parent / 'run.py'


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure the other version, then this one; print both with their ratio.

    Args:
        args: The command line.
        arguments: That part of it that says what to measure.

    Returns:
        Exit status: 1 if an implementation of either failed.

    Raises:
        ValueError: If the other version does not exist or cannot be measured.
    """
    chosen = list(arguments) if args.impl else [*arguments, '--impl', 'ours']
    with tempfile.TemporaryDirectory() as folder:
        with other_checkout(args.compare, Path(folder) / 'checkout') as ops:
            before = measured(ops, chosen, Path(folder) / 'before.json')
        now = measured(args.ops, chosen, Path(folder) / 'now.json')
    print(table(before, now, args.compare))
    if args.out:
        out = results.file(args.out, now['header'])
        results.write(out, now)
        command_line.say_written(out)
    failed = [row for result in (before, now) for row in result['left_out'] if row['failed']]
    return int(bool(failed))


def check(version: str) -> str | None:
    """The commit of another version; None for a folder with a checkout.

    Raises:
        ValueError: If it is neither.
    """
    if Path(version).is_dir():
        if not (Path(version) / 'ops' / 'linvis_ops').is_dir():
            raise ValueError(f'--compare: the folder {version} has no ops/linvis_ops.')
        return None
    commit = results.git(RUN.parent, 'rev-parse', '--verify', '--quiet', f'{version}^{{commit}}')
    if not commit:
        raise ValueError(f'--compare: {version!r} is neither a commit nor a folder.')
    return commit


@contextmanager
def other_checkout(version: str, folder: Path) -> Iterator[Path]:
    """The ops folder of another version, checked out for a while unless it is a folder already.

    Args:
        version: A commit, or a folder with a checkout.
        folder: Where the commit is checked out; it must not exist.

    Raises:
        ValueError: If version is neither.
    """
    commit = check(version)
    if commit is None:
        yield Path(version) / 'ops'
        return
    git = ['git', '-C', str(RUN.parent), 'worktree']
    subprocess.run([*git, 'add', '--quiet', '--detach', str(folder), commit], check=True)
    try:
        yield folder / 'ops'
    finally:
        subprocess.run([*git, 'remove', '--force', str(folder)], check=True)


def measured(ops: Path, arguments: Sequence[str], out: Path) -> dict[str, Any]:
    """Results of the linvis_ops in a folder, measured in a process of its own.

    Raises:
        ValueError: If that process measured nothing.
    """
    print(f'== linvis_ops of {ops}', flush=True)
    places = ['--ops', str(ops), '--out', str(out), '--part']
    subprocess.run([sys.executable, str(RUN), *arguments, *places], check=False)
    if not out.exists():
        raise ValueError(f'the linvis_ops of {ops} could not be measured; see above.')
    return results.read(out)


def ratios(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[Row | None, Row | None]]:
    """Rows of both results that belong together; None where one of them lacks it."""
    old = {results.key(row): row for row in before['rows']}
    new = {results.key(row): row for row in now['rows']}
    return [(old.get(key), new.get(key)) for key in dict.fromkeys((*old, *new))]


def table(before: dict[str, Any], now: dict[str, Any], version: str) -> str:
    """Times of both, the ratio before / now (above 1: faster now), and the speed of a copy in each.

    Args:
        before: Results of the other version.
        now: Results of this one.
        version: Name of the other version.
    """
    lines = [
        f'before: {version}, {_header(before)}',
        f'now: {_header(now)}',
        f'{"":74}{"before ms":>12}{"now ms":>12}{"before/now":>12}',
    ]
    for old, new in ratios(before, now):
        row = new or old
        assert row is not None
        name = ' '.join(
            (row['op'], row['impl'], row['pass'], row['dtype'], results.shape_text(row['shape']))
        )
        times = ''.join(f'{one["ms"]:12.4f}' if one else f'{"-":>12}' for one in (old, new))
        ratio = f'{old["ms"] / new["ms"]:11.2f}x' if old and new else f'{"-":>12}'
        lines.append(f'{name:74}{times}{ratio}')
    return '\n'.join(lines)


def _header(result: dict[str, Any]) -> str:
    header = result['header']
    commit = header['commit'][:10] if header['commit'] else 'commit unknown'
    changed = ' with uncommitted changes' if header['dirty'] else ''
    return f'{commit}{changed}, copy {header["copy_gb_s"]:.0f} GB/s on {header["gpu"]}'


if __name__ == '__main__':
    sys.exit(
        command_line.complain(
            'compare.py is a part of run.py: use python ops/benchmarks/run.py --compare COMMIT.'
        )
    )
