import importlib.util
import sys

import pytest

NEW_TRANSFORMERS = """
import importlib, sys
from linvis.compat.mmcv_ext import install_mmcv_ext
from linvis.compat.optional import install_multimodal
install_mmcv_ext()
when = sys.argv[1]
if when != 'never':
    without = install_multimodal() if when == 'before' else None
try:
    importlib.import_module('mmpretrain.models')
    print('imported')
except ImportError as error:
    print(error)
if when == 'after':
    without = install_multimodal()
    importlib.import_module('mmpretrain.models')
print('imported' if 'mmpretrain.models' in sys.modules else 'not imported')
print(without if when != 'never' else None)
"""


@pytest.fixture
def site_with_transformers_5(tmp_path):
    """A folder in which transformers 5 is installed, and cannot be imported."""
    info = tmp_path / 'transformers-5.1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.1.0\n')
    package = tmp_path / 'transformers'
    package.mkdir()
    (package / '__init__.py').write_text("raise ImportError('name is gone from transformers')\n")
    return tmp_path


def test_new_transformers_do_not_break_mmpretrain(run_python, site_with_transformers_5):
    out = run_python(NEW_TRANSFORMERS, 'before', path=[site_with_transformers_5])
    assert out.splitlines()[-3:] == [
        'imported',
        'imported',
        "mmpretrain's multimodal models (transformers is 5.1.0, they need 4)",
    ]


def test_new_transformers_do_not_break_mmpretrain_after_a_failed_import(
    run_python, site_with_transformers_5
):
    out = run_python(NEW_TRANSFORMERS, 'after', path=[site_with_transformers_5])
    assert out.splitlines()[-3:-1] == ['name is gone from transformers', 'imported']


def test_mmdet_without_imgaug_has_all_but_the_lane_transforms():
    if importlib.util.find_spec('imgaug') is not None:
        pytest.skip('imgaug is installed')
    from mmdet.datasets.transforms import generate_line

    assert not [name for name in sys.modules if name.startswith('imgaug')]
    step = {'name': 'Resize', 'p': 1.0, 'parameters': {'size': {'width': 8, 'height': 8}}}
    with pytest.raises(ImportError, match=r'^Resize needs the package imgaug, '):
        generate_line.ImageAug([step])
