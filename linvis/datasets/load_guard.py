"""Loading transforms that name, skip and count files that cannot be read."""

import copy
import logging
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import c_uint8
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, Compose
from mmengine import fileio
from mmengine.logging import print_log

from linvis.datasets.integrity import find_damage, find_label_fault, find_picture_fault
from linvis.registry import TRANSFORMS

# One flag for every hash of a path. Setting a flag twice is harmless, so worker processes need no
# lock, and one that is killed cannot leave a lock behind.
NUM_FLAGS = 1 << 16
MAX_LIMIT = NUM_FLAGS // 16


class UnreadableDataError(RuntimeError):
    """More files could not be read than the limit allows."""


@TRANSFORMS.register_module()
class LoadGuard(BaseTransform):
    """Run loading transforms; a file that cannot be read is named, counted and skipped.

    Missing, empty, truncated and undecodable pictures and label maps, label maps of another size
    than their picture, and pictures that do not come out with three channels are unreadable. Each
    such file is logged once, and `None` is returned, upon which datasets of mmengine draw another
    sample in training. An error of the inner transforms on files that are in order is raised.

    The count is over distinct files, shared by the worker processes of a data loader (started by
    fork or by spawn, persistent or not). Every training process has a count of its own. Files are
    told apart by a 16-bit hash, so that of n files about n² / 131072 are missed.

    A score over the readable part of a validation set would be false: use `max_unreadable=0`
    there, which stops at the first file.

    Args:
        transforms: Loading transforms, as configs (types resolve in the default scope, prefixes
            such as 'mmdet.' work) or callables. The first ones load 'img' from 'img_path' and,
            where wanted, 'gt_seg_map' from 'seg_map_path'.
        max_unreadable: Number of unreadable files to skip, 0 to 4096; one more stops the run.

    Raises:
        UnreadableDataError: When one more file than `max_unreadable` cannot be read.
    """

    def __init__(
        self,
        transforms: Sequence[dict[str, Any] | Callable[[dict], dict | None]],
        max_unreadable: int = 50,
    ) -> None:
        if isinstance(max_unreadable, bool) or not isinstance(max_unreadable, int):
            raise TypeError(f'LoadGuard: max_unreadable must be an int, got {max_unreadable!r}.')
        if not 0 <= max_unreadable <= MAX_LIMIT:
            raise ValueError(
                f'LoadGuard: max_unreadable must be within 0 to {MAX_LIMIT}, got {max_unreadable}.'
            )
        if not transforms:
            raise ValueError(
                'LoadGuard: transforms is empty; name the loading transforms, e.g. '
                "[dict(type='LoadImageFromFile')]."
            )
        self.transforms = Compose(list(transforms))
        self.max_unreadable = max_unreadable
        backends = [getattr(step, 'backend_args', None) for step in self.transforms.transforms]
        self._backend_args = next(filter(None, backends), None)
        self._flags = RawArray(c_uint8, NUM_FLAGS)
        self._recent: deque[str] = deque(maxlen=3)

    @property
    def num_unreadable(self) -> int:
        """Number of distinct unreadable files met by this process and its workers."""
        return bytes(self._flags).count(1)

    def transform(self, results: dict) -> dict | None:
        """Load one sample.

        Args:
            results: Needs 'img_path'; 'seg_map_path' where a label map is loaded.

        Returns:
            What the inner transforms return; None when a file cannot be read.
        """
        fault = self._examine(results['img_path'], find_damage)
        bad = (results['img_path'], fault) if fault else None
        loaded = None
        if bad is None:
            try:
                loaded = self.transforms(results)
            # The inner transforms fail in many ways (AssertionError, AttributeError, cv2.error).
            # What is not explained by a bad file is raised again.
            except Exception:
                bad = self._diagnose(results)
                if bad is None:
                    raise
            else:
                bad = self._inspect(results, loaded)
        if bad is None:
            return loaded
        self._reject(*bad)
        return None

    def _examine(self, path: str, check: Callable[[bytes], str | None]) -> str | None:
        """Read a file and return its fault by the given check, or None."""
        try:
            return check(fileio.get(path, backend_args=self._backend_args))
        except FileNotFoundError:
            return 'the file does not exist'
        except OSError as error:
            return f'the file cannot be read ({error.strerror or error})'

    def _diagnose(self, results: dict) -> tuple[str, str] | None:
        """Return the file that explains an error of the inner transforms, and its fault."""
        checks = (('img_path', find_picture_fault), ('seg_map_path', find_label_fault))
        for key, check in checks:
            path = results.get(key)
            fault = self._examine(path, check) if path else None
            if fault:
                return str(path), fault
        return None

    def _inspect(self, results: dict, loaded: dict | None) -> tuple[str, str] | None:
        """Return the file that was loaded wrongly without an error, and its fault."""
        if loaded is None:
            return self._diagnose(results) or (results['img_path'], 'the loader returned nothing')
        picture = loaded.get('img')
        if isinstance(picture, np.ndarray) and (picture.ndim != 3 or picture.shape[2] != 3):
            shape = ' x '.join(map(str, picture.shape))
            return results['img_path'], f'expected three channels, it decodes to {shape}'
        labels = loaded.get('gt_seg_map')
        if labels is None or not loaded.get('seg_map_path'):
            return None
        fault = self._examine(loaded['seg_map_path'], find_damage)
        # Not the present size: test pipelines load label maps after resizing the picture.
        size = loaded.get('ori_shape')
        if fault is None and size is not None and labels.shape != tuple(size[:2]):
            fault = f'the label map is {labels.shape}, its picture {tuple(size[:2])}'
        return (loaded['seg_map_path'], fault) if fault else None

    def _reject(self, path: str, fault: str) -> None:
        """Log and count an unreadable file; stop when there are too many."""
        flag = zlib.crc32(str(path).encode()) % NUM_FLAGS
        is_new = not self._flags[flag]
        self._flags[flag] = 1
        if str(path) not in self._recent:
            self._recent.append(str(path))
        if self.max_unreadable == 0:
            raise UnreadableDataError(
                f'Cannot read {path}: {fault}; a score without it would be false, so replace the '
                'file (tools/verify_data.py --decode names all such files).'
            )
        count = self.num_unreadable
        if count > self.max_unreadable:
            raise UnreadableDataError(
                f'{count} files cannot be read, the limit is max_unreadable={self.max_unreadable}; '
                f'the last: {", ".join(self._recent)} ({fault}); replace them '
                '(tools/verify_data.py --decode names all of them) or raise the limit.'
            )
        if is_new:
            print_log(
                f'Skipped unreadable file {path}: {fault} ({count} of at most '
                f'{self.max_unreadable}).',
                logger='current',
                level=logging.WARNING,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> 'LoadGuard':
        """Copy all but the count, which stays common to the copies."""
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        for name, value in vars(self).items():
            setattr(result, name, value if name == '_flags' else copy.deepcopy(value, memo))
        return result

    def __repr__(self) -> str:
        steps = ', '.join(type(step).__name__ for step in self.transforms.transforms)
        return f'{type(self).__name__}([{steps}], max_unreadable={self.max_unreadable})'
