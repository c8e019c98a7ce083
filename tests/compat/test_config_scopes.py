import pytest
from mmengine.config import Config

from linvis import compat


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_configs_inherit_from_the_task_libraries(scope, tmp_path):
    compat.install()
    config = tmp_path / 'inherits.py'
    config.write_text(f"_base_ = '{scope}::_base_/default_runtime.py'\n")
    assert Config.fromfile(config).default_scope == scope
