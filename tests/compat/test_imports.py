import importlib
import inspect
import sys
from contextlib import contextmanager

import pytest

from linvis.compat.imports import StandInModule, around_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the import path whose module `inner` looks for a name in sys.modules."""
    folder = tmp_path / 'compat_example'
    folder.mkdir()
    (folder / '__init__.py').write_text('')
    (folder / 'inner.py').write_text(
        "import sys\nseen = 'compat_helper' in sys.modules\nflag = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    yield 'compat_example'
    for name in [name for name in sys.modules if name.startswith('compat_example')]:
        del sys.modules[name]


def test_around_import_executes_one_module_inside_the_context(package):
    @contextmanager
    def context(module):
        assert not hasattr(module, 'flag')
        sys.modules['compat_helper'] = sys
        yield
        del sys.modules['compat_helper']
        module.flag += 1

    around_import(f'{package}.inner', context)
    assert f'{package}.inner' not in sys.modules
    inner = importlib.import_module(f'{package}.inner')
    assert inner.seen
    assert inner.flag == 2
    assert 'compat_helper' not in sys.modules


def test_around_import_leaves_an_ordinary_module(package):
    @contextmanager
    def context(module):
        yield

    around_import(f'{package}.inner', context)
    inner = importlib.import_module(f'{package}.inner')
    assert inner.__spec__.loader is inner.__loader__
    assert isinstance(inner.__loader__, importlib.machinery.SourceFileLoader)
    assert 'flag = 1' in inspect.getsource(inner)
    importlib.reload(inner)


def test_around_import_of_a_module_that_is_absent_stays_an_import_error(package):
    around_import(f'{package}.outer', lambda module: pytest.fail('executed'))
    with pytest.raises(ModuleNotFoundError, match=r'compat_example\.outer'):
        importlib.import_module(f'{package}.outer')


def test_stand_in_module_has_every_public_name_and_calls_raise():
    module = StandInModule('example', 'Example.', provided={'one': 1}, missing=LookupError)
    assert module.one == 1
    missing = module.anything
    assert missing.__name__ == 'anything'
    with pytest.raises(LookupError, match=r'^anything$'):
        missing(1, key=2)
    with pytest.raises(AttributeError, match="'example' has no attribute '_hidden'"):
        _ = module._hidden
