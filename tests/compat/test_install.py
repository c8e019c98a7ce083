import inspect
import sys

import pytest
import torch
from mmcv.ops import MaskedConv2d, ModulatedDeformConv2d, RoIPool
from mmcv.ops.info import get_compiler_version, get_compiling_cuda_version

from linvis.compat import CompatReport, install
from linvis.compat.coco import install_coco_eval

PLAIN_IMPORT = """
import sys
modules, finders = set(sys.modules), list(sys.meta_path)
import linvis
print(sorted(name for name in set(sys.modules) - modules if not name.startswith('linvis')))
print(sys.meta_path == finders)
"""

WITH_EXTENSION = """
import sys
import mmcv
mmcv.__path__.insert(0, sys.argv[1])
from linvis.compat import install
try:
    print(install().mmcv_ext, sys.modules['mmcv._ext'].__file__)
except ImportError as error:
    print(error)
"""

WITHOUT_MMCV = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv':
            raise ModuleNotFoundError("No module named 'mmcv'", name='mmcv')
sys.meta_path.insert(0, Absent())
from linvis.compat import install
try:
    install()
except ModuleNotFoundError as error:
    print(error)
"""

TWICE = """
import sys
from linvis.compat import install
first, finders = install(), list(sys.meta_path)
import mmcv.ops
print(install() is first, sys.meta_path == finders)
"""


def test_import_of_linvis_alone_changes_nothing(run_python):
    assert run_python(PLAIN_IMPORT).splitlines() == ['[]', 'True']


def test_install_steps_aside_for_a_real_extension(run_python, tmp_path):
    (tmp_path / '_ext.py').write_text('')
    assert run_python(WITH_EXTENSION, tmp_path).strip().endswith(f'compiled {tmp_path}/_ext.py')


def test_install_names_an_extension_that_does_not_load(run_python, tmp_path):
    (tmp_path / '_ext.py').write_text("raise ImportError('undefined symbol: _ZN2at')")
    out = run_python(WITH_EXTENSION, tmp_path).strip()
    assert out.startswith('the compiled operators of mmcv do not load (undefined symbol: _ZN2at)')
    assert len(out.splitlines()) == 1


def test_install_without_mmcv_says_how_to_get_it(run_python):
    out = run_python(WITHOUT_MMCV).strip()
    assert out.startswith('mmcv is not installed: run `pip install')
    assert len(out.splitlines()) == 1


def test_install_twice_changes_and_logs_nothing_more(run_python):
    lines = run_python(TWICE).splitlines()
    assert lines[-1] == 'True True'
    assert len(lines) == 2
    assert 'linvis.compat: mmcv operators: ' in lines[0]


def test_install_reports_what_is_in_place():
    report = install()
    assert isinstance(report, CompatReport)
    assert report.mmcv_ext == 'stand-in'
    assert report.coco_eval == 'faster-coco-eval'
    assert 'COCO evaluation: faster-coco-eval' in str(report)


def test_report_lists_what_is_not_available():
    report = CompatReport('compiled', 'pycocotools', ('this (reason)', 'that (reason)'))
    assert str(report).endswith('; not available: this (reason), that (reason).')
    assert str(CompatReport('compiled', 'pycocotools', ())).endswith('pycocotools.')


def test_install_without_faster_coco_eval_leaves_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    assert install_coco_eval() == 'pycocotools'


def test_versions_of_the_compiler_say_that_there_was_none():
    assert get_compiler_version() == 'not compiled'
    assert get_compiling_cuda_version() == 'not available'


@pytest.mark.parametrize(
    ('operator', 'call'),
    [
        ('modulated_deform_conv_forward', lambda: deform_conv(torch.rand(1, 2, 4, 4))),
        ('roi_pool_forward', lambda: RoIPool(2)(torch.rand(1, 2, 4, 4), torch.zeros(1, 5))),
        ('masked_im2col_forward', lambda: masked_conv(torch.rand(1, 2, 4, 4))),
    ],
)
def test_operator_without_a_stand_in_says_so_in_one_sentence(operator, call):
    with pytest.raises(NotImplementedError) as caught:
        call()
    assert str(caught.value) == (
        f'the mmcv operator {operator} has no stand-in: install mmcv with its compiled operators '
        '(mmcv._ext) to use it.'
    )


def deform_conv(x):
    layer = ModulatedDeformConv2d(2, 2, 3, padding=1)
    return layer(x, torch.zeros(1, 18, 4, 4), torch.ones(1, 9, 4, 4))


def masked_conv(x):
    return MaskedConv2d(2, 2, 3, padding=1).eval()(x, torch.ones(1, 4, 4))


def test_stand_in_module_bears_introspection():
    module = sys.modules['mmcv._ext']
    assert not hasattr(module, '__file__')
    assert not hasattr(module, '_private')
    assert inspect.getmodule(install).__name__ == 'linvis.compat'
    assert sys.modules['mmcv']._ext is module
