r"""Formulas as MathML, which browsers draw by themselves, without network or LaTeX.

A formula that docutils cannot translate is a warning with its page, line and text, and so an error
of a build with -W; in the page stands its source. `\big`, `\Big`, `\bigg` and `\Bigg`, which
docutils knows only with an l or r at the end, are taken for plain symbols of that size.
"""

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import bigdelimiters, tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

SIZES = {'big': 1, 'Big': 2, 'bigg': 3, 'Bigg': 4}


def translate(self: Any, node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    """MathML of a formula, or its source where that cannot be had."""
    formula = node.astext()
    try:
        return tex2mathml(formula, as_block=as_block)
    # beside MathError: AttributeError for `a & b`, IndexError for `^2`
    except Exception as error:
        page = self.builder.current_docname
        logger.warning(
            'this formula cannot be shown (%s): %s',
            error if isinstance(error, ValueError) else f'{type(error).__name__}: {error}',
            ' '.join(formula.split()),
            location=logging.get_node_location(node) or page,
            type='mathml',
        )
        return f'<code>{self.encode(formula)}</code>'


def visit_inline(self: Any, node: nodes.math) -> None:
    self.body.append(translate(self, node, as_block=False))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.math_block) -> None:
    formula = translate(self, node, as_block=True)
    self.body.append(f'<div class="math" style="margin: 0.8em 0">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    for name, size in SIZES.items():
        bigdelimiters.setdefault(name, size)
    app.add_html_math_renderer(
        'mathml', inline_renderers=(visit_inline, None), block_renderers=(visit_block, None)
    )
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
