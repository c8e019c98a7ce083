"""Measure the operators on a GPU, beside their rivals.

    python ops/benchmarks/run.py --out docs/benchmarks
    python ops/benchmarks/run.py --op bi_wkv --shape 16x4096x192 --dtype bfloat16 --pass fwd
    python ops/benchmarks/run.py --op bi_wkv --compare HEAD~1

docs/measuring.md says how it measures and what the figures mean. Exit status: 0, 1 if an
implementation of ours failed, 2 if nothing can be measured.
"""

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import command_line, compare, results
from benchmarks.passes import PASSES, ways_to_copy
from benchmarks.timing import CudaTimer, Timer

if TYPE_CHECKING:  # it imports linvis_ops, which has to come from the right folder first
    from benchmarks.measure import Selection

OPS = Path(__file__).resolve().parents[1]
DTYPES = ('bfloat16', 'float16', 'float32')
NO_GPU = command_line.no_gpu('Operators are measured')
DESCRIPTION = 'Measure the operators on a GPU, beside their rivals.'
REPEATS = 200
QUICK_REPEATS = 20
# Bytes read plus bytes written of the copies that are the yardstick. Their speed depends on size
# and way, and the fastest may be another one in the next process. What a call leaves in the
# second-level cache, unwritten, is up to 12 % of the smallest on an H200, and 6 % of the next.
BIG_COPIES = (2**29, 2**30, 2**31, 2**32)


def main(argv: Sequence[str] | None = None, program: str = 'run.py') -> int:
    """Measure, print the rows and write them; or compare two commits."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser(program).parse_args(argv)
    try:
        selection = selected(args)
        if args.compare:
            compare.check(args.compare)
        if not has_gpu():
            return command_line.complain(NO_GPU)
        if args.compare:
            return compare.main(args, measuring_arguments(argv))
        command = shlex.join([f'ops/benchmarks/{program}', *measuring_arguments(argv)])
        return measure(args, selection, command)
    except ValueError as error:
        return command_line.complain(f'{program}: {error}')


def has_gpu() -> bool:
    """Whether there is something to measure on."""
    return torch.cuda.is_available()


def selected(args: argparse.Namespace) -> 'Selection':
    """What the command line asks for.

    Raises:
        ValueError: If that does not exist.
    """
    use_operators(args.ops)
    from benchmarks.measure import Selection
    from benchmarks.registry import named

    repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    selection = Selection(
        named(args.op), args.shape, args.dtype, args.passes, args.impl, repeats, args.quick
    )
    selection.check()
    return selection


def measure(args: argparse.Namespace, selection: 'Selection', command: str) -> int:
    """Measure a selection, print the rows and write them; returns the exit status."""
    from benchmarks.measure import Measurement

    with CudaTimer() as timer:
        yardstick = yardsticks(timer, selection.repeats, torch.cuda.mem_get_info()[0])
        header = results.make_header(
            args.ops,
            f'python {command}',
            args.commit,
            **yardstick,
            flush_mib=timer.flush_bytes / 2**20,
            complete=False,
        )
        print(json.dumps(header, indent=1))
        out = results.file(args.out, header) if args.out else None
        measurement = Measurement(selection, timer, yardstick['copy_gb_s'])

        def save() -> None:
            if out:
                results.write(out, results.assemble(header, measurement))

        for row in measurement.run():
            print(results.row_text(row), flush=True)
            save()  # a run that is stopped keeps what it has
        header['complete'] = True
        save()
    if out and not args.part:
        command_line.say_written(out)
    return int(any(row['failed'] for row in measurement.left_out))


def yardsticks(timer: Timer, repeats: int, free: int) -> dict[str, Any]:
    """Speed of big copies and time of a call that does next to nothing.

    Args:
        timer: Measures a call.
        repeats: Most repetitions.
        free: Bytes of memory that are free; no copy takes more than half of them.

    Returns:
        Fields of a header: copies, copy_gb_s, copy_gib, copy_way, floor_ms.
    """
    speeds: dict[tuple[str, float], float] = {}
    for total in sorted({min(size, free // 2) for size in BIG_COPIES}):
        for way, speed in _copy_speeds(timer, total, repeats).items():
            speeds[way, round(total / 2**30, 2)] = speed
        timer.release()
    fastest = max(speeds, key=lambda copy: speeds[copy])
    one = torch.zeros(1, device=timer.device)
    floor = timer.times(lambda: one.fill_(1.0), repeats)
    return {
        'copies': {f'{way} {size}': speed for (way, size), speed in speeds.items()},
        'copy_gb_s': speeds[fastest],
        'copy_gib': fastest[1],
        'copy_way': fastest[0],
        'floor_ms': round(floor.quantile(0.5), 5),
    }


def _copy_speeds(timer: Timer, total: int, repeats: int) -> dict[str, float]:
    """GB/s of both ways to move so many bytes; no buffer is left when it returns."""
    return {
        way: round(total / timer.times(copy, repeats).quantile(0.5) / 1e6, 1)
        for way, copy in ways_to_copy(total, timer.device).items()
    }


def use_operators(folder: Path) -> None:
    """Import linvis_ops from a folder.

    Raises:
        ValueError: If there is none, or another one is imported already.
    """
    wanted = folder.resolve() / 'linvis_ops'
    if not (wanted / '__init__.py').is_file():
        raise ValueError(f'{folder} has no package linvis_ops.')
    sys.path.insert(0, str(wanted.parent))
    try:
        found = Path(importlib.import_module('linvis_ops').__file__ or '').resolve().parent
    finally:
        sys.path.pop(0)
    if found != wanted:
        raise ValueError(f'linvis_ops was imported from {found} before, not from {wanted}.')


def parser(program: str = 'run.py', description: str = DESCRIPTION) -> argparse.ArgumentParser:
    """The command line of a program that measures: this one, or one that does more."""
    made = command_line.Parser(
        prog=program, description=description, parents=[_places()], allow_abbrev=False
    )
    made.add_argument('--op', nargs='+', default=[], metavar='NAME', help='default: all')
    made.add_argument(
        '--shape',
        nargs='+',
        type=command_line.sizes,
        default=[],
        metavar='SIZES',
        help='such as 128x196x192, in the order of the axes; default: those of real networks',
    )
    made.add_argument('--dtype', nargs='+', default=[], choices=DTYPES)
    made.add_argument('--pass', nargs='+', default=PASSES, choices=PASSES, dest='passes')
    made.add_argument(
        '--impl', nargs='+', default=[], metavar='NAME', help='backend, rival, ours or rivals'
    )
    made.add_argument(
        '--repeats',
        type=command_line.positive,
        help=f'most repetitions of a call (default: {REPEATS}, with --quick {QUICK_REPEATS})',
    )
    made.add_argument(
        '--quick', action='store_true', help='first shape and first dtype of each operator'
    )
    return made


def _places() -> argparse.ArgumentParser:
    """The part of the command line that says where, not what: no part of a recorded command."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    made.add_argument(
        '--out',
        type=command_line.out_file_or_folder,
        help='JSON file for the results, or a folder for ops_GPU.json',
    )
    made.add_argument(
        '--compare',
        metavar='COMMIT',
        help='measure linvis_ops of another commit, too, or of a folder with another checkout',
    )
    made.add_argument(
        '--ops',
        type=Path,
        default=OPS,
        metavar='FOLDER',
        help='folder of the linvis_ops to measure, for run.py (default: that of this checkout)',
    )
    made.add_argument('--commit', help='the commit to record where git cannot tell it')
    # one of the two measurements of a comparison, whose file is gone when that ends
    made.add_argument('--part', action='store_true', help=argparse.SUPPRESS)
    return made


def measuring_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments that say what to measure and how, as typed."""
    return _places().parse_known_args(argv)[1]


if __name__ == '__main__':
    sys.exit(main())
