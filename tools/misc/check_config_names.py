"""Checks the names of config files: python tools/misc/check_config_names.py [FILE ...]."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
RULE = (
    '[algorithm_]backbone_[neck_]{gpus}xb{batch per gpu}-{length}_data[-size].py, where length is '
    'like 300e, 1x, 160k or 200i (epochs, multiples of 12 epochs, thousands of iterations, '
    'iterations), words inside a part are joined by - and all is lower case'
)
_WORDS = r'[a-z0-9]+(?:\.[0-9]+)?(?:-[a-z0-9]+)*'
PATTERN = re.compile(
    rf'(?:(?P<algorithm>{_WORDS})_)??(?P<backbone>{_WORDS})_(?:(?P<neck>{_WORDS})_)?'
    r'(?P<gpus>[1-9]\d*)xb(?P<batch>[1-9]\d*)-(?P<count>[1-9]\d*)(?P<unit>[exki])_'
    rf'(?P<data>{_WORDS}?)(?:-(?P<size>\d+px|\d+x\d+))?\.py'
)


def parse_name(name: str) -> dict[str, str | None]:
    """Splits the name of a config file into its parts.

    With two words before the schedule the first counts as the backbone, the second as the neck.

    Args:
        name: File name without folder.

    Returns:
        The parts: algorithm, backbone, neck, gpus, batch, count, unit, data, size.

    Raises:
        ValueError: If the name does not follow the rule.
    """
    match = PATTERN.fullmatch(name)
    if match is None:
        raise ValueError(f'Config name {name} does not follow {RULE}.')
    return match.groupdict()


def find_configs(root: Path = CONFIGS) -> list[Path]:
    """Returns the config files below a folder, without those that are only inherited from."""
    return sorted(path for path in root.rglob('*.py') if '_base_' not in path.parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the names that break the rule; the status is 1 if there are any."""
    parser = argparse.ArgumentParser(description='Check the names of config files.')
    parser.add_argument('files', nargs='*', type=Path, help='default: all below configs/')
    args = parser.parse_args(argv)
    files = [path for path in args.files if '_base_' not in path.parts] or find_configs()
    faults = [fault for fault in map(_fault_of, files) if fault]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _fault_of(path: Path) -> str | None:
    try:
        parse_name(path.name)
    except ValueError as error:
        return str(error)
    return None


if __name__ == '__main__':
    sys.exit(main())
