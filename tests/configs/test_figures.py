"""Parameters and multiply-accumulates of classifiers: headers, READMEs and metafiles agree."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FIGURES = re.compile(r'\(([\d.]+) M parameters, ([\d.]+) G(MACs counted here|FLOPs), 224 px\)')


def classifiers():
    for path in sorted(ROOT.glob('configs/*/metafile.yml')):
        for model in yaml.safe_load(path.read_text())['Models']:
            if 'FLOPs' in model['Metadata']:
                yield pytest.param(model, path.parent, id=model['Name'])


@pytest.mark.parametrize(('model', 'folder'), list(classifiers()))
def test_figures_agree(model, folder):
    config = ROOT / model['Config']
    found = FIGURES.search(' '.join(ast.get_docstring(ast.parse(config.read_text())).split()))
    *in_header, unit = found.groups()
    readme = (folder / 'README.md').read_text()
    in_readme = re.search(rf'\({config.name}\)[^|]*\| ([\d.]+) M \| ([\d.]+) \|', readme).groups()
    assert list(in_readme) == in_header
    exact = model['Metadata']['Parameters'] / 1e6, model['Metadata']['FLOPs'] / 1e9
    for text, value in zip(in_header, exact, strict=True):
        if unit == 'FLOPs':  # as the authors published it, who round up at times
            assert abs(float(text) - value) < 0.1
        else:
            assert text == f'{value:.1f}'


def test_every_figure_of_a_header_is_checked():
    headers = [path for path in ROOT.glob('configs/*/*.py') if ' M parameters' in path.read_text()]
    checked = {param.values[0]['Config'] for param in classifiers()}
    assert {str(path.relative_to(ROOT)) for path in headers} == checked
