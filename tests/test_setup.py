"""The CUDA extension is built on request alone."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from setuptools._distutils.filelist import FileList

SETUP = Path(__file__).parents[1] / 'setup.py'


def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py gives to setuptools."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(SETUP.parent)
    runpy.run_path(str(SETUP))
    return given


@pytest.mark.parametrize('value', [None, '', '0'])
def test_the_wheel_is_pure_python_unless_asked(monkeypatch, value):
    monkeypatch.delenv('LINVIS_BUILD_CUDA', raising=False)
    if value is not None:
        monkeypatch.setenv('LINVIS_BUILD_CUDA', value)
    given = arguments(monkeypatch)
    assert {'linvis', 'linvis_ops', 'linvis_ops.bi_wkv'} <= set(given['packages'])
    assert 'ext_modules' not in given
    assert 'cmdclass' not in given


@pytest.mark.parametrize('value', ['true', 'yes', '2'])
def test_other_requests_are_refused(monkeypatch, value):
    monkeypatch.setenv('LINVIS_BUILD_CUDA', value)
    with pytest.raises(SystemExit, match=f"must be 1 .* or 0, not '{value}'"):
        arguments(monkeypatch)


def test_build_without_pytorch_names_the_remedy(monkeypatch):
    monkeypatch.setenv('LINVIS_BUILD_CUDA', '1')
    monkeypatch.setitem(sys.modules, 'torch.utils.cpp_extension', None)
    with pytest.raises(SystemExit, match='give pip the option --no-build-isolation'):
        arguments(monkeypatch)


def test_source_distributions_have_the_sources_of_the_extension(monkeypatch):
    monkeypatch.chdir(SETUP.parent)
    files = FileList()
    for line in Path('MANIFEST.in').read_text().splitlines():
        files.process_template_line(line)
    assert set(Path('ops/csrc').glob('[!.]*')) <= {Path(name) for name in files.files}


def test_the_extension_has_all_its_sources(monkeypatch):
    monkeypatch.setenv('LINVIS_BUILD_CUDA', '1')
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '9.0')
    monkeypatch.setattr('torch.utils.cpp_extension.CUDA_HOME', '/usr/local/cuda')
    (extension,) = arguments(monkeypatch)['ext_modules']
    assert extension.name == 'linvis_ops._C'
    listed = {SETUP.parent / name for name in (*extension.sources, *extension.depends)}
    assert listed == set((SETUP.parent / 'ops/csrc').glob('[!.]*'))
