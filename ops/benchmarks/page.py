"""Write docs/ops/benchmarks.md and its pictures from docs/benchmarks/ops_*.json."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.passes import PASSES
from benchmarks.results import Row

DOCS = Path(__file__).resolve().parents[2] / 'docs'
PAGE = Path('ops/benchmarks.md')
FOLDER = Path('benchmarks')  # of results and pictures
PATTERN = 'ops_*.json'
NOTHING = 'Nothing has been measured yet.'
NOT_MEASURED = 'not measured'
STOPPED = 'This run was stopped before its end: what is missing was not reached.'
COPY = 'copy'
# Ways of the fastest copy, as results.HEADER_FIELDS has them; older files do not tell the way.
WAYS = {'copy': '`copy_`', 'kernel': 'an element-wise kernel'}
INTRODUCTION = """\
# Speed of the operators

Made by `python ops/benchmarks/page.py` from `docs/benchmarks/ops_*.json`.
[Measuring](../measuring.md) says how these figures come about and what they mean.
"""
# Colours that stay apart for colour-blind eyes (Okabe and Ito).
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
COPY_COLOUR = '#666666'
APART = 1.5  # ratio of numbers of tokens that a logarithmic axis shows apart


def page(named_results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The page.

    Args:
        named_results: Name of the file without suffix and its content, of each file.
    """
    if not any(result['rows'] for _, result in named_results):
        return f'{INTRODUCTION}\n{NOTHING}\n'
    parts = [INTRODUCTION]
    operators = dict.fromkeys(row['op'] for _, result in named_results for row in result['rows'])
    for operator in operators:
        parts.append(f'## {operator}\n')
        for name, result in named_results:
            for dtype, rows in _by_dtype(result, operator).items():
                file = f' (`{name}`)' if _in_several_files(named_results, operator) else ''
                parts += [
                    f'### {operator}, {dtype}, {result["header"]["gpu"]}{file}\n',
                    '' if _complete(result['header']) else f'{STOPPED}\n',
                    f'{_picture_alt(operator, dtype, name)}\n',
                    _table(rows),
                    _explanation(rows),
                    _left_out(result['left_out'], operator, dtype),
                ]
    parts.append('## Where and when\n')
    parts += [_origin(name, result['header']) for name, result in named_results]
    return '\n'.join(part for part in parts if part)


def pictures(named_results: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Figure]:
    """A picture of each operator and dtype of each file, by file name."""
    drawn = {}
    for name, result in named_results:
        for operator in dict.fromkeys(row['op'] for row in result['rows']):
            for dtype, rows in _by_dtype(result, operator).items():
                title = f'{operator}, {dtype}, {result["header"]["gpu"]}'
                if _in_several_files(named_results, operator):
                    title += f' ({name})'
                file = _picture_name(operator, dtype, name)
                drawn[file] = draw(rows, result['header']['copy_gb_s'], title)
    return drawn


def _in_several_files(named_results: Sequence[tuple[str, dict[str, Any]]], operator: str) -> bool:
    """Whether the name of an operator alone does not say which file is meant."""
    having = [
        name for name, result in named_results if any(r['op'] == operator for r in result['rows'])
    ]
    return len(having) > 1


def _complete(header: Row) -> bool:
    """Whether the run came to its end, as far as its file says."""
    return bool(header.get('complete', True))


def draw(rows: Sequence[Row], copy_gb_s: float, title: str) -> Figure:
    """Time an element against T, a panel for each pass.

    Shapes differ in B and C as well, so the time is divided by the number of elements: what takes
    time in proportion to its input lies on a level line. Every shape is a point; of shapes with
    nearly the same T, the line goes through the one measured first.

    Args:
        rows: Rows of one operator and dtype.
        copy_gb_s: Speed of the fastest copy, whose time for the least traffic is drawn as a line.
        title: Above the panels.
    """
    passes = [name for name in PASSES if any(row['pass'] == name for row in rows)]
    figure = Figure(figsize=(3.6 * len(passes) + 1.8, 3.9), layout='constrained')
    figure.suptitle(title)
    panels = figure.subplots(1, len(passes), squeeze=False, sharey=True)[0]
    for axis, pass_name in zip(panels, passes, strict=True):
        _draw_pass(axis, rows, pass_name, copy_gb_s)
    panels[0].set_ylabel('time per element of B × T × C (ps)')
    # some implementations are missing in a panel, so the legend takes from all of them
    entries = {
        label: handle
        for axis in panels
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc='outside right center', frameon=False)
    return figure


def _draw_pass(axis: Axes, rows: Sequence[Row], pass_name: str, copy_gb_s: float) -> None:
    rivals = [name for name in _implementations(rows) if name != COPY]
    same = [row for row in rows if row['pass'] == pass_name]
    on_line = _on_line(same)
    for index, name in enumerate(rivals):
        chosen = sorted((row for row in same if row['impl'] == name), key=_tokens)
        if not chosen:
            continue
        ours = chosen[0]['ours']
        points: dict[str, Any] = {
            'color': COLOURS[index % len(COLOURS)],
            'marker': 'o' if ours else 's',
            'markersize': 6 if ours else 4,
        }
        joined = [row for row in chosen if row['shape'] in on_line]
        beside = [row for row in chosen if row['shape'] not in on_line]
        style, width = ('-', 2.4) if ours else ('--', 1.4)
        axis.plot(*_points(joined), style, linewidth=width, label=name, **points)
        if beside:
            axis.plot(*_points(beside), linestyle='', **points)
    least = max(row['least_bytes'] / row['elements'] for row in same)
    axis.axhline(
        least * 1e3 / copy_gb_s, color=COPY_COLOUR, linestyle=':', label='least traffic,\nas a copy'
    )
    ticks = sorted({row['tokens'] for row in same})
    axis.set_xscale('log', base=2)
    axis.set_yscale('log')
    axis.set_xticks(_apart(ticks), [f'{tick:,}' for tick in _apart(ticks)], rotation=45)
    axis.minorticks_off()
    axis.set_title(pass_name)
    axis.set_xlabel('tokens T')
    axis.grid(alpha=0.3)


def _apart(ticks: Sequence[int]) -> list[int]:
    """Those ticks that are far enough apart to be read on a logarithmic axis."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick > APART * kept[-1]:
            kept.append(tick)
    return kept


def _on_line(rows: Sequence[Row]) -> list[dict[str, int]]:
    """Shapes that are joined by a line: of those with nearly the same T, the first."""
    kept: list[Row] = []
    for row in rows:
        ratios = [row['tokens'] / other['tokens'] for other in kept]
        if all(max(ratio, 1 / ratio) > APART for ratio in ratios):
            kept.append(row)
    return [row['shape'] for row in kept]


def _points(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """T and picoseconds an element."""
    return [row['tokens'] for row in rows], [row['ms'] * 1e9 / row['elements'] for row in rows]


def _tokens(row: Row) -> int:
    return int(row['tokens'])


def _by_dtype(result: dict[str, Any], operator: str) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in result['rows']:
        if row['op'] == operator:
            grouped.setdefault(row['dtype'], []).append(row)
    return grouped


def _implementations(rows: Sequence[Row]) -> list[str]:
    """Names of implementations as measured; a copy last, since it computes nothing."""
    names = dict.fromkeys(row['impl'] for row in rows)
    return sorted(names, key=lambda name: name == COPY)


def _time(row: Row) -> float:
    return float(row['ms'])


def _table(rows: Sequence[Row]) -> str:
    """One line a shape and pass, one column an implementation."""
    names = _implementations(rows)
    axes = list(rows[0]['shape'])
    ours = any(row['ours'] for row in rows)
    head = [*axes, 'pass', *names, *(('GB/s', 'of copy', 'MiB') if ours else ())]
    lines = [head, ['--:'] * len(axes) + ['---'] + ['--:'] * (len(head) - len(axes) - 1)]
    by_place: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        place = (*row['shape'].values(), row['pass'])
        by_place.setdefault(place, {})[row['impl']] = row
    for place, measured in by_place.items():
        fastest = min(
            (row for row in measured.values() if row['impl'] != COPY), key=_time, default=None
        )
        cells = [_cell(measured.get(name), fastest) for name in names]
        line = [*(str(part) for part in place), *cells]
        best = min((row for row in measured.values() if row['ours']), key=_time, default=None)
        if best:
            line += [
                f'{best["gb_s"]:,.0f}',
                f'{best["copy_share"]:.0%}',
                f'{best["peak_mib"]:,.0f}',
            ]
        elif ours:
            line += [NOT_MEASURED] * 3
        lines.append(line)
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def _explanation(rows: Sequence[Row]) -> str:
    """What the columns of the table mean."""
    ours = list(dict.fromkeys(row['impl'] for row in rows if row['ours']))
    parts = ['Medians in milliseconds; the fastest is bold, a copy left aside.']
    if ours:
        parts.append(
            f'GB/s: least traffic of the operator over the time of {" or ".join(ours)}'
            f'{", whichever is faster" if len(ours) > 1 else ""}; of copy: its share of the '
            'speed of the fastest copy of the run; MiB: its peak memory.'
        )
    if not all(row['graph'] for row in rows):
        parts.append('\\*: not captured in a CUDA graph, so time of the host may count.')
    return '\n'.join(parts) + '\n'


def _cell(row: Row | None, fastest: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    text = f'{row["ms"]:.4f}' if row['ms'] < 1 else f'{row["ms"]:.3f}'
    text = f'**{text}**' if row is fastest else text
    return text if row['graph'] else f'{text}\\*'


def _left_out(left_out: Sequence[Row], operator: str, dtype: str) -> str:
    """A list of what could not be measured, reason by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in left_out:
        if row['op'] == operator and row['dtype'] == dtype:
            what = f'{results.shape_text(row["shape"])} {row["pass"]}'
            reasons.setdefault((row['impl'], row['reason']), []).append(what)
    if not reasons:
        return ''
    lines = [
        f'* {impl}: {reason} ({", ".join(what) if len(what) < 4 else f"{len(what)} rows"})'
        for (impl, reason), what in reasons.items()
    ]
    return 'Not measured:\n\n' + '\n'.join(lines) + '\n'


def _origin(name: str, header: Row) -> str:
    """One line on what a file was measured with."""
    commit = f'commit `{header["commit"][:10]}`' if header['commit'] else 'commit not recorded'
    changed = ' with uncommitted changes' if header['dirty'] else ''
    end = '' if _complete(header) else ' was stopped before its end.'
    way = header.get('copy_way')
    kind = f' ({WAYS[way]}, {header["copy_gib"]:g} GiB)' if way else ''
    return (
        f'* `{name}.json`: {header["gpu"]}, driver {header["driver"]}, torch {header["torch"]}, '
        f'triton {header["triton"]}, {header["date"]}, {commit}{changed}. '
        f'The fastest copy{kind} ran at {header["copy_gb_s"]:,.0f} GB/s; a call that '
        f'does next to nothing took {header["floor_ms"] * 1e3:.1f} µs. `{header["command"]}`{end}\n'
    )


def _picture_name(operator: str, dtype: str, name: str) -> str:
    return f'{name}_{operator}_{dtype}.svg'


def _picture_alt(operator: str, dtype: str, name: str) -> str:
    target = Path('..') / FOLDER / _picture_name(operator, dtype, name)
    return f'![Time an element of {operator} against T]({target.as_posix()})'


def load(docs: Path) -> list[tuple[str, dict[str, Any]]]:
    """All result files of a docs folder, by name.

    Raises:
        ValueError: If there are none, or one of them has another layout.
    """
    files = sorted((docs / FOLDER).glob(PATTERN))
    if not files:
        raise ValueError(f'there are no results {docs / FOLDER / PATTERN}.')
    return [(file.stem, _read(file)) for file in files]


def _read(file: Path) -> dict[str, Any]:
    try:
        return results.read(file)
    # JSON of other things than objects may raise a TypeError
    except (ValueError, TypeError) as error:
        raise ValueError(f'{file} holds no results: {error}') from error


def write(docs: Path) -> list[Path]:
    """Write page and pictures, remove pictures of what is not there any more.

    Args:
        docs: Folder with benchmarks/ops_*.json.

    Returns:
        What was written.

    Raises:
        ValueError: If there are no results, or a file has another layout.
    """
    named_results = load(docs)
    drawn = pictures(named_results)
    for stale in (docs / FOLDER).glob('ops_*.svg'):
        if stale.name not in drawn:
            stale.unlink()
    written = []
    # without a date and with fixed ids, the same rows give the same file
    with mpl.rc_context({'svg.hashsalt': 'linvis'}):
        for name, figure in drawn.items():
            written.append(docs / FOLDER / name)
            figure.savefig(written[-1], metadata={'Date': None})
    (docs / PAGE).parent.mkdir(parents=True, exist_ok=True)
    (docs / PAGE).write_text(page(named_results))
    return [*written, docs / PAGE]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description='Write the page of measured figures.')
    parser.add_argument('--docs', type=Path, default=DOCS, metavar='FOLDER')
    try:
        for path in write(parser.parse_args(argv).docs):
            print(f'Wrote {path}.')
    except ValueError as error:
        print(f'page.py: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
