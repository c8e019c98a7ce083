"""Draws loss, learning rate and metrics of training runs from their scalars.json.

python tools/analysis/plot_curves.py WORK_DIR [WORK_DIR ...] --out curves.png
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Entries of a line of scalars.json that tell when, or how fast, but are no result.
_BOOKKEEPING = {'step', 'iter', 'epoch', 'time', 'data_time', 'memory', 'base_lr'}
_PERCENT = ('accuracy/', 'single-label/', 'aAcc', 'mIoU', 'mAcc', 'mDice', 'mFscore')
Curve = tuple[list[float], list[float]]


class Run:
    """The scalars of one work folder.

    Attributes:
        name: Name of the folder.
        train: Name to the points logged in training, over iterations.
        val: Name to the points logged in validation.
        val_unit: What validation counts by: 'epoch' or 'iteration'.
    """

    def __init__(self, work_dir: Path) -> None:
        self.name = work_dir.resolve().name
        records = read_records(work_dir)
        train = [record for record in records if 'lr' in record]
        val = [record for record in records if 'lr' not in record]
        self.train = _curves(train)
        self.val = _curves(val)
        self.val_unit = 'epoch' if any('epoch' in record for record in train) else 'iteration'


def read_records(work_dir: Path) -> list[dict[str, float]]:
    """Reads what a work folder logged, in the order of its runs.

    Args:
        work_dir: Folder of a training run; it may have been resumed several times.

    Returns:
        The lines of every scalars.json in it.

    Raises:
        FileNotFoundError: If there is none.
    """
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(
            f'{work_dir} holds no */vis_data/scalars.json: name the work folder of a training run.'
        )
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line]


def plot(runs: Sequence[Run], keys: Sequence[str] = ()) -> Figure:
    """Draws one panel for the loss, one for the learning rate and one for each metric.

    Args:
        runs: What to draw; each gets its own colour.
        keys: Names as in scalars.json; default: loss, lr and the metrics that were validated more
            than once.

    Returns:
        The figure.

    Raises:
        ValueError: If a name is in none of the runs.
    """
    chosen = list(keys) or _default_keys(runs)
    logged = sorted({key for run in runs for key in (*run.train, *run.val)})
    unknown = [key for key in chosen if key not in logged]
    if unknown:
        raise ValueError(f'{", ".join(unknown)}: not logged; there are {", ".join(logged)}.')
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout='constrained')
    figure.suptitle('Training curves: ' + ', '.join(run.name for run in runs))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for key, axis in zip(chosen, axes, strict=False):
        _draw(axis, key, runs)
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the arguments, draws and writes the picture."""
    parser = argparse.ArgumentParser(description='Draw the curves of training runs.')
    parser.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR')
    parser.add_argument('--out', type=Path, required=True, help='picture to write (.png, .svg)')
    parser.add_argument('--keys', nargs='+', default=[], help='names in scalars.json to draw')
    args = parser.parse_args(argv)
    mpl.use('Agg')
    try:
        figure = plot([Run(folder) for folder in args.work_dirs], args.keys)
    except (FileNotFoundError, ValueError) as error:
        print(f'{parser.prog}: {error}', file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(args.out, dpi=120)
    except (OSError, ValueError) as error:
        print(f'{parser.prog}: {args.out} cannot be written: {error}', file=sys.stderr)
        return 1
    print(f'Wrote {args.out}.')
    return 0


def _curves(records: Iterable[dict[str, float]]) -> dict[str, Curve]:
    """Sorts records into curves; where a resumed run repeats a step its value counts."""
    points: dict[str, dict[float, float]] = {}
    for record in records:
        for key, value in record.items():
            if key not in _BOOKKEEPING and isinstance(value, (int, float)):
                points.setdefault(key, {})[record['step']] = value
    return {
        key: (sorted(values), [values[step] for step in sorted(values)])
        for key, values in points.items()
    }


def _default_keys(runs: Sequence[Run]) -> list[str]:
    first = [key for key in ('loss', 'lr') if any(key in run.train for run in runs)]
    several = {key for run in runs for key, (steps, _) in run.val.items() if len(steps) > 1}
    return first + sorted(several)


def _draw(axis: Axes, key: str, runs: Sequence[Run]) -> None:
    """Fills one panel."""
    units = set()
    for index, run in enumerate(runs):
        in_training = key in run.train
        curve = run.train.get(key) or run.val.get(key)
        if curve is None:
            continue
        marker = '' if in_training and len(curve[0]) > 1 else '.'
        axis.plot(*curve, marker=marker, color=f'C{index}', label=run.name)
        units.add('iteration' if in_training else run.val_unit)
    axis.set_title(key)
    axis.set_xlabel(' or '.join(sorted(units)))
    axis.set_ylabel(_label(key))
    axis.grid(alpha=0.3)
    if len(runs) > 1:
        axis.legend()


def _label(key: str) -> str:
    """Says what a vertical axis shows, with the unit."""
    if key == 'lr':
        return 'learning rate'
    if key.startswith('loss') or '.loss' in key or key.endswith('_loss'):
        return 'loss (nats or as defined by the head)'
    return f'{key} (%)' if key.startswith(_PERCENT) else f'{key} (fraction)'


if __name__ == '__main__':
    sys.exit(main())
