"""What the OpenMMLab libraries need to run without compiled operators, on current versions.

Call `install()` before the first import of `mmcv.ops`, mmdet, mmseg or mmpretrain.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Literal

from mmengine.logging import print_log

from linvis.compat.coco import install_coco_eval
from linvis.compat.config_scopes import install_config_scopes
from linvis.compat.mmcv_ext import install_mmcv_ext
from linvis.compat.optional import install_imgaug, install_multimodal

__all__ = ['CompatReport', 'install']


@dataclass(frozen=True)
class CompatReport:
    """What serves the libraries after `install()`.

    Attributes:
        mmcv_ext: Whether the operators of mmcv are compiled ones or the stand-ins of this package.
        coco_eval: Package that computes COCO metrics.
        without: Parts of the libraries that cannot be used here, in words, with the reason.
    """

    mmcv_ext: Literal['compiled', 'stand-in']
    coco_eval: Literal['faster-coco-eval', 'pycocotools']
    without: tuple[str, ...]

    def __str__(self) -> str:
        without = f'; not available: {", ".join(self.without)}' if self.without else ''
        return f'mmcv operators: {self.mmcv_ext}; COCO evaluation: {self.coco_eval}{without}.'


@functools.cache
def install() -> CompatReport:
    """Make mmcv, mmdet, mmseg and mmpretrain importable and usable; log one line that says how.

    A compiled `mmcv._ext` is used if there is one. Further calls return the report of the first.

    Returns:
        What is in place.

    Raises:
        ModuleNotFoundError: If mmcv is not installed.
        ImportError: If a compiled `mmcv._ext` is installed and does not load.
    """
    install_config_scopes()
    report = CompatReport(
        mmcv_ext=install_mmcv_ext(),
        coco_eval=install_coco_eval(),
        without=tuple(text for text in (install_imgaug(), install_multimodal()) if text),
    )
    print_log(f'linvis.compat: {report}', logger='current', level=logging.INFO)
    return report
