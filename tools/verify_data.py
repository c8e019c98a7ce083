"""Verify a prepared data folder and name what is missing.

    python tools/verify_data.py imagenet data/imagenet
    python tools/verify_data.py coco data/coco --decode
    python tools/verify_data.py ade data/mini/ade --any-count

Exit status: 0 when all is in order, 1 when something is wrong, 2 for a wrong command line.
"""

import argparse
import os
import sys
from itertools import islice

try:
    from linvis.datasets.verify import verify_dataset
except ModuleNotFoundError as error:
    sys.exit(f'{error} in {sys.executable}: activate the environment, as the README says.')

MAX_LINES = 20


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('kind', choices=('imagenet', 'coco', 'ade'), help='layout of the folder')
    parser.add_argument('root', help='the prepared folder')
    parser.add_argument(
        '--any-count',
        action='store_true',
        help='accept any number of files and classes, for subsets such as data/mini',
    )
    parser.add_argument('--decode', action='store_true', help='open every picture as well')
    parser.add_argument(
        '--workers', type=int, default=os.cpu_count() or 1, help='processes that open files'
    )
    options = parser.parse_args(arguments)
    if options.workers < 0:
        parser.error(f'--workers must be 0 or more, got {options.workers}')
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_args(arguments)
    problems = verify_dataset(
        options.kind,
        options.root,
        any_count=options.any_count,
        decode=options.decode,
        workers=options.workers,
        progress=sys.stderr.isatty(),
    )
    shown = 0
    for line in islice(problems, MAX_LINES):
        print(line)
        shown += 1
    more = sum(1 for _ in problems)
    if more:
        print(f'... and {more} more')
    if shown:
        print(f'{options.root}: problems found: {shown + more}', file=sys.stderr)
        return 1
    print(f'{options.root}: in order')
    return 0


if __name__ == '__main__':
    sys.exit(main())
