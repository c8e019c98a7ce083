"""Tests first, then figures: measures operators only if their tests pass on this GPU.

    python ops/benchmarks/verify.py --op bi_wkv --out docs/benchmarks

Takes the options of run.py. Tests that are skipped are listed with the reason. Exit status: 1 if a
test failed, else that of run.py.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import compare, run
from benchmarks.command_line import complain

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = (
    'Run the GPU tests of the operators first, and measure them, as run.py does, only if all pass.'
)


def main(argv: Sequence[str] | None = None) -> int:
    """Test the chosen operators, then measure them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = run.parser('verify.py', DESCRIPTION).parse_args(argv)
    if args.ops != run.OPS:
        return complain('verify.py: --ops is for run.py; the tests are those of this checkout.')
    try:
        selection = run.selected(args)
        if args.compare:
            compare.check(args.compare)
    except ValueError as error:
        return complain(f'verify.py: {error}')
    if not run.has_gpu():
        return complain(run.NO_GPU)
    operators = [operator for operator in selection.operators if not operator.missing()]
    files = list(dict.fromkeys(file for each in operators for file in each.test_files()))
    if not passed(files):
        print(f'Nothing is measured, since not all is well in {" ".join(files)}.', file=sys.stderr)
        return 1
    return run.main(argv, 'verify.py')


def passed(files: Sequence[str]) -> bool:
    """Whether GPU tests in these files were run, not all of them skipped, and passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-rs', '-m', 'gpu', f'--junitxml={report}']
        if subprocess.run([*command, *files], cwd=ROOT, check=False).returncode:
            return False
        suite = ElementTree.parse(report).getroot()[0]
        return int(suite.get('tests', 0)) > int(suite.get('skipped', 0))


if __name__ == '__main__':
    sys.exit(main())
