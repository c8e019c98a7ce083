"""Lets docstrings hold Markdown tables and bars, which reStructuredText reads otherwise."""

import re
from typing import Any

from sphinx.application import Sphinx


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip('|').split('|')]


def _list_table(rows: list[str]) -> list[str]:
    header, _, *body = rows
    out = ['.. list-table::', '   :header-rows: 1', '']
    for row in (header, *body):
        first, *others = _cells(row)
        out += [f'   * - {first}', *(f'     - {cell}' for cell in others)]
    return ['', *out, '']


def translate(
    app: Sphinx,  # noqa: ARG001
    what: str,  # noqa: ARG001
    name: str,  # noqa: ARG001
    obj: Any,  # noqa: ARG001
    options: Any,  # noqa: ARG001
    lines: list[str],
) -> None:
    out: list[str] = []
    table: list[str] = []
    for line in [*lines, '']:
        if re.match(r'\s*\|.*\|\s*$', line):
            table.append(line)
            continue
        if table:
            out += _list_table(table)
            table = []
        parts = re.split(r'(`[^`]*`)', line)
        out.append(
            ''.join(part if part.startswith('`') else part.replace('|', r'\|') for part in parts)
        )
    lines[:] = out[:-1]


def setup(app: Sphinx) -> dict[str, Any]:
    # before napoleon, whose handler has the default priority of 500
    app.connect('autodoc-process-docstring', translate, priority=400)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
