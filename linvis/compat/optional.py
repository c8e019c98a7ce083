"""What mmdet and mmpretrain import at their own import, and can do without."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from linvis.compat.imports import StandInModule, around_import

_IMGAUG_USER = 'mmdet.datasets.transforms.generate_line'
_IMGAUG_MODULES = (
    'imgaug',
    'imgaug.augmenters',
    'imgaug.augmentables',
    'imgaug.augmentables.lines',
    'imgaug.augmentables.segmaps',
)
_MULTIMODAL_FLAG = 'mmpretrain.utils.dependency'


def install_imgaug() -> str | None:
    """Let mmdet be imported without imgaug, which only its lane transforms use.

    Returns:
        What does not work, in words, or None if imgaug is installed.
    """
    if importlib.util.find_spec('imgaug') is not None:
        return None
    around_import(_IMGAUG_USER, _with_imgaug)
    return "mmdet's lane transforms (imgaug is not installed)"


def install_multimodal() -> str | None:
    """Let mmpretrain be imported beside transformers 5, which its multimodal models do not know.

    Returns:
        What does not work, in words, or None if transformers is older or not installed.
    """
    try:
        version = importlib.metadata.version('transformers')
    except importlib.metadata.PackageNotFoundError:
        return None
    if int(version.partition('.')[0]) < 5:
        return None
    around_import(_MULTIMODAL_FLAG, _without_multimodal)
    # An earlier import of mmpretrain that failed leaves this module behind.
    if _MULTIMODAL_FLAG in sys.modules:
        _unset_multimodal(sys.modules[_MULTIMODAL_FLAG])
    return f"mmpretrain's multimodal models (transformers is {version}, they need 4)"


@contextmanager
def _with_imgaug(_module: ModuleType) -> Iterator[None]:
    """Stand-ins for imgaug while one module is executed, so that nobody else takes it for there."""
    stand_ins = {
        name: StandInModule(name, 'Absent.', provided={}, missing=_no_imgaug)
        for name in _IMGAUG_MODULES
    }
    for name, stand_in in stand_ins.items():
        parent, _, child = name.rpartition('.')
        if parent:
            setattr(stand_ins[parent], child, stand_in)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for stand_in in stand_ins.values():
            del sys.modules[stand_in.__name__]


@contextmanager
def _without_multimodal(module: ModuleType) -> Iterator[None]:
    yield
    _unset_multimodal(module)


def _unset_multimodal(module: ModuleType) -> None:
    module.WITH_MULTIMODAL = False  # type: ignore[attr-defined]


def _no_imgaug(name: str) -> ImportError:
    return ImportError(
        f'{name} needs the package imgaug, which is not installed: run `pip install imaug`.'
    )
