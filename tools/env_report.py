"""Reports versions, devices, operators and data folders: python tools/env_report.py [--json]."""

import argparse
import json
import sys
from collections.abc import Sequence

try:
    from linvis.utils.environment import collect_environment, format_environment
except ModuleNotFoundError as error:
    sys.exit(f'{error} in {sys.executable}: activate the environment, as the README says.')


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report."""
    parser = argparse.ArgumentParser(description='Report the environment that linvis runs in.')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    args = parser.parse_args(argv)
    report = collect_environment()
    print(json.dumps(report, indent=2) if args.json else format_environment(report))
    return 0


if __name__ == '__main__':
    sys.exit(main())
