import re
import subprocess
import sys

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
