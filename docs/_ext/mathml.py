r"""Formulas as MathML, which browsers draw by themselves, without network or LaTeX.

A formula that docutils cannot translate is a warning with its page, line and text, and so an error
of a build with -W; in the page stands its source. `\big`, `\Big`, `\bigg` and `\Bigg`, which
docutils knows only with an l or r at the end, are taken for plain symbols of that size.

What docutils makes of accents and braces is mended for browsers, which follow MathML Core:
an accent stands clear above its letter, a script beside both; a brace is as wide as what it holds,
with its label below (or above) it.
"""

import re
from html import unescape
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math.latex2mathml import accents, bigdelimiters, tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

SIZES = {'big': 1, 'Big': 2, 'bigg': 3, 'Bigg': 4}

ElementTree.register_namespace('', 'http://www.w3.org/1998/Math/MathML')
NAME = '{http://www.w3.org/1998/Math/MathML}'
ACCENTS = set(accents.values())
# the element that holds a brace, and what docutils makes of its label
BRACES = {'\u23df': ('munder', 'msub'), '\u23de': ('mover', 'msup')}
# names of characters that HTML knows and XML does not, as ApplyFunction after a function
ENTITY = re.compile('&(?!amp;|lt;|gt;|quot;|apos;)[A-Za-z]+;')


def split_accent(element: ElementTree.Element) -> None:
    """Makes <munderover> of letter, script and accent an <msub> of the accented letter."""
    if element.tag != NAME + 'munderover':
        return
    letter, script, mark = element
    if mark.tag == NAME + 'mo' and mark.text in ACCENTS:
        accented = ElementTree.Element(NAME + 'mover')
        accented.extend([letter, mark])
        element[:] = [accented, script]
        element.tag = NAME + 'msub'
        element.attrib.clear()


def join_scripts(element: ElementTree.Element) -> None:
    """Makes <msup> of an <msub> whose base is accented an <msubsup>, its scripts in one column."""
    if element.tag != NAME + 'msup' or element[0].tag != NAME + 'msub':
        return
    sub, above = element
    if is_accented(sub[0]):
        element[:] = [*sub, above]
        element.tag = NAME + 'msubsup'


def is_accented(element: ElementTree.Element) -> bool:
    """Whether an element is a <mover> of a letter and an accent."""
    return (
        element.tag == NAME + 'mover'
        and element[1].tag == NAME + 'mo'
        and element[1].text in ACCENTS
    )


def label_brace(element: ElementTree.Element) -> None:
    """Makes a script at a brace its label, and the brace as wide as what it holds."""
    for brace, (holder, script) in BRACES.items():
        if element.tag == NAME + holder and element[1].text == brace:
            element[1].set('stretchy', 'true')
        if element.tag == NAME + script:
            base = element[0]
            if base.tag == NAME + holder and base[1].text == brace:
                element.tag = NAME + holder


def mend(formula: str) -> str:
    """MathML of docutils with accents and braces as browsers draw them right."""
    tree = ElementTree.fromstring(ENTITY.sub(lambda found: unescape(found[0]), formula))
    # children first
    for element in reversed(list(tree.iter())):
        split_accent(element)
        join_scripts(element)
        label_brace(element)
    # as an accent, the mark runs into its letter in fonts without data for mathematics
    for element in tree.iter(NAME + 'mover'):
        if is_accented(element):
            element.set('accent', 'false')
    return ElementTree.tostring(tree, encoding='unicode')


def translate(self: Any, node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    """MathML of a formula, or its source where that cannot be had."""
    formula = node.astext()
    try:
        return mend(tex2mathml(formula, as_block=as_block))
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
