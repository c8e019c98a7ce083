"""COCO evaluation by faster-coco-eval where the libraries ask for pycocotools."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

from linvis.compat.imports import around_import

_WRAPPERS = 'mmdet.datasets.api_wrappers'


def install_coco_eval() -> Literal['faster-coco-eval', 'pycocotools']:
    """Serve faster-coco-eval under the name of pycocotools from now on.

    pycocotools stays if faster-coco-eval is not installed, or if mmdet has been imported with it.

    Returns:
        Which of the two mmdet evaluates with.
    """
    try:
        import faster_coco_eval
    except ModuleNotFoundError as error:
        if error.name != 'faster_coco_eval':
            raise
        return 'pycocotools'
    if sys.modules.get('pycocotools') is not faster_coco_eval:
        if _WRAPPERS in sys.modules:
            return 'pycocotools'
        faster_coco_eval.init_as_pycocotools()
        around_import(f'{_WRAPPERS}.cocoeval_mp', _one_process)
    return 'faster-coco-eval'


@contextmanager
def _one_process(module: ModuleType) -> Iterator[None]:
    """Give mmdet's evaluation by many processes the plain one.

    It overrides steps of pycocotools that the faster one does not have; speed was its only purpose.
    """
    yield
    module.COCOevalMP = module.COCOeval  # type: ignore[attr-defined]
