"""Sphinx configuration: python -m sphinx -W -b html docs docs/_build/html."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / '_ext'), str(DOCS.parent), str(DOCS.parent / 'ops')]

from linvis import __version__  # noqa: E402

project = 'linvis'
author = 'The linvis authors'
copyright = '2026, The linvis authors'
version = release = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'mathml',
    'markdown_docstrings',
]
source_suffix = {'.md': 'markdown'}
exclude_patterns = ['_build', '_ext']
root_doc = 'index'

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
html_math_renderer = 'mathml'

# single backticks in docstrings are code, as in Markdown
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_format = 'short'
autodoc_typehints_description_target = 'documented'
autodoc_class_signature = 'mixed'
napoleon_numpy_docstring = False
napoleon_custom_sections = ['Source']

html_theme = 'furo'
html_title = f'linvis {release}'
html_show_sourcelink = False
html_static_path = ['_static']
html_css_files = ['linvis.css']
highlight_language = 'none'
