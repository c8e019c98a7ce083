import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

pytest.importorskip('myst_parser')
pytest.importorskip('sphinx')

CONF = """
import sys
sys.path.insert(0, {folder!r})
extensions = ['myst_parser', 'mathml']
myst_enable_extensions = ['dollarmath']
html_math_renderer = 'mathml'
html_theme = 'basic'
"""
PAGE = r"""# Title

Right: $x^2$. Wrong: $\foo < x$.

$$
\begin{foo}
x
\end{foo}
$$

Wrong with another exception: $^2$.
"""


@pytest.fixture
def build(tmp_path, pytestconfig):
    """Builds a page with warnings as errors; returns status, messages and the HTML."""

    def run(text):
        folder = pytestconfig.rootpath / 'docs' / '_ext'
        (tmp_path / 'conf.py').write_text(CONF.format(folder=str(folder)))
        (tmp_path / 'index.md').write_text(text)
        command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html']
        done = subprocess.run([*command, '.', 'out'], cwd=tmp_path, capture_output=True, text=True)
        page = tmp_path / 'out' / 'index.html'
        return done.returncode, done.stderr, page.read_text() if page.exists() else ''

    return run


def test_formula_that_cannot_be_shown_is_named_with_page_and_line(build):
    status, messages, page = build(PAGE)
    assert status == 1
    assert 'Traceback' not in messages
    lines = messages.splitlines()
    assert [re.search(r'index\.md:(\d+): WARNING', line)[1] for line in lines] == ['3', '5', '11']
    assert r'this formula cannot be shown (Unknown LaTeX command "\foo".): \foo < x' in lines[0]
    assert r': \begin{foo} x \end{foo}' in lines[1]
    assert ': ^2' in lines[2]
    # the source stands in the page, and the build went on to its end
    assert r'<code>\foo &lt; x</code>' in page
    assert '<msup>' in page


def test_delimiters_of_a_size(build):
    commands = ('big', 'Big', 'bigg', 'Bigg')
    formulas = [rf'$\{c}( x \{c}|^2 \{c}\rfloor \{c}l[ y \{c}r]$' for c in commands]
    status, messages, page = build('# Title\n\n' + ' '.join(formulas))
    assert (status, messages) == (0, '')
    found = re.findall(r'<mo maxsize="([\d.]+)em"[^>]*>(.)</mo>', page)
    assert ''.join(symbol for _, symbol in found) == 4 * '(|⌋[]'
    sizes = [float(size) for size, _ in found]
    assert sizes == sorted(sizes)
    # those without l or r are as large as those with it
    assert [len(set(sizes[first : first + 5])) for first in (0, 5, 10, 15)] == [1, 1, 1, 1]
    assert len(set(sizes)) == 4


def shape(element):
    """An element as nested text: msub(mover(F ˉ) t)."""
    tag = element.tag.rpartition('}')[2]
    text = (element.text or '').strip()
    return f'{tag}({" ".join(map(shape, element))})' if len(element) else text


@pytest.fixture
def formulas(build):
    """Builds a page with formulas; returns the <math> of each."""

    def run(*sources):
        status, messages, page = build('# Title\n\n' + ' '.join(f'${s}$' for s in sources))
        assert (status, messages) == (0, '')
        found = re.findall('<math.*?</math>', page, re.DOTALL)
        assert len(found) == len(sources)
        return [ElementTree.fromstring(formula) for formula in found]

    return run


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        (r'\bar F', 'mover(F ˉ)'),
        (r'\bar F_t', 'msub(mover(F ˉ) t)'),
        (r'\bar F^1_t', 'msubsup(mover(F ˉ) t 1)'),
        (r'\bar F_t^1', 'msubsup(mover(F ˉ) t 1)'),
        (r'\hat x_{t + 1}', 'msub(mover(x ˆ) mrow(t + 1))'),
        (r'\sqrt{\hat x_t}', 'msqrt(msub(mover(x ˆ) t))'),
    ],
)
def test_scripts_stand_beside_an_accented_letter(formulas, source, expected):
    (tree,) = formulas(source)
    assert [shape(child) for child in tree] == [expected]
    # an accent of MathML runs into its letter where the font has no data for mathematics
    (mover,) = (element for element in tree.iter() if element.tag.endswith('}mover'))
    assert mover.get('accent') == 'false'


def test_braces_are_wide_and_have_their_labels_on_their_side(formulas):
    under, over = formulas(r'\underbrace{a + b}_{\text{two}}', r'\overbrace{a + b}^n')
    assert shape(under[0]) == 'munder(munder(mrow(a + b) ⏟) two)'
    assert shape(over[0]) == 'mover(mover(mrow(a + b) ⏞) n)'
    assert [tree[0][0][1].get('stretchy') for tree in (under, over)] == ['true', 'true']


def test_other_scripts_and_limits_stay(formulas):
    found = formulas(r'x_t^2', r'\sum_{t < T}^3 x', r'\exp x')
    assert [' '.join(map(shape, tree)) for tree in found] == [
        'msubsup(x t 2)',
        'munderover(∑ mrow(t < T) 3) x',
        'exp \u2061 x',
    ]
    assert found[1][0][0].get('movablelimits') == 'true'
