"""COCO evaluation by faster-coco-eval where the libraries ask for pycocotools."""

import importlib
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
        faster = importlib.import_module('faster_coco_eval')
    except ModuleNotFoundError as error:
        if error.name != 'faster_coco_eval':
            raise
        return 'pycocotools'
    wrappers = sys.modules.get(_WRAPPERS)
    if wrappers is not None and not issubclass(wrappers.COCOeval, faster.COCOeval_faster):
        return 'pycocotools'
    if wrappers is None:
        faster.init_as_pycocotools()
        around_import(_WRAPPERS, _official_evaluation)
    return 'faster-coco-eval'


@contextmanager
def _official_evaluation(module: ModuleType) -> Iterator[None]:
    """Give mmdet the evaluation of official numbers.

    It replaces mmdet's evaluation by many processes too, which overrides steps of pycocotools that
    the faster one does not have; speed is all that it is for.
    """
    yield
    evaluation = importlib.import_module('linvis.compat.coco_eval').OfficialCOCOeval
    module.COCOeval = module.COCOevalMP = evaluation  # type: ignore[attr-defined]
