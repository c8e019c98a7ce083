"""Check what a dataset config points at before a dataset is built from it.

The dataset classes of the task libraries fail on a missing or malformed folder as well, but deep
inside, with a message that does not say what to do.
"""

import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

PICTURE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')
COCO_KEYS = ('images', 'annotations', 'categories')
IMAGE_KEYS = frozenset({'id', 'file_name', 'width', 'height'})
# What boxes need; masks need 'segmentation' as well.
BOX_KEYS = frozenset({'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd'})
# A larger annotation file (COCO's training split: 450 MB) is searched, not parsed: parsing takes
# many seconds and the dataset class does it again.
PARSE_LIMIT = 64 * 2**20
NUM_IMAGENET_CLASSES = 1000
REMEDY = 'see docs/data.md, and tools/verify_data.py for a full check'


class DatasetError(ValueError):
    """A folder or annotation file is not what its dataset needs; the message is one sentence."""


def check_dataset_cfg(cfg: Mapping[str, Any]) -> None:
    """Check that the folders and files of a dataset config exist and have the expected content.

    Knows ImageNet and CustomDataset (mmpretrain), CocoDataset (mmdet), ADE20KDataset and
    BaseSegDataset (mmseg), with or without a scope prefix, and wrappers around them. Of other
    types only a local `data_root` is checked. Paths of remote storage ('s3://...') are not.

    With `test_mode=True`, also checks that no LoadGuard of the pipeline skips files: such a dataset
    cannot draw another sample.

    Args:
        cfg: The config of a dataset, as in `train_dataloader.dataset`.

    Raises:
        DatasetError: With one sentence that names the path, what is wrong, and the remedy.
    """
    name = _type_name(cfg)
    if isinstance(cfg.get('dataset'), Mapping):
        check_dataset_cfg(cfg['dataset'])
        return
    if isinstance(cfg.get('datasets'), (list, tuple)):
        for inner in cfg['datasets']:
            check_dataset_cfg(inner)
        return
    if cfg.get('test_mode'):
        _need_strict_guards(name, cfg.get('pipeline') or ())
    root = cfg.get('data_root')
    if root and _is_local(root) and not Path(root).is_dir():
        raise DatasetError(f'{name}: data_root {root} is not a folder; {REMEDY}.')
    check = _CHECKS.get(name)
    if check is not None:
        check(name, cfg)


def check_evaluator_cfg(cfg: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
    """Check the annotation files that metrics read themselves.

    Args:
        cfg: The config of a metric or several, as in `test_evaluator`.

    Raises:
        DatasetError: With one sentence that names the path, what is wrong, and the remedy.
    """
    for metric in (cfg,) if isinstance(cfg, Mapping) else cfg:
        path = metric.get('ann_file') if isinstance(metric, Mapping) else None
        if not isinstance(path, str) or not _is_local(path):
            continue
        _need_file(Path(path), f'annotation file of the metric {_type_name(metric)}')
        if _type_name(metric) == 'CocoMetric':
            _read_checked_instances(Path(path), BOX_KEYS)


def read_instances(path: str | Path) -> dict[str, Any]:
    """Read a COCO annotation file.

    Args:
        path: The JSON file.

    Returns:
        Its content, with at least the keys 'images', 'annotations' and 'categories'.

    Raises:
        DatasetError: If the file is missing, is no JSON, lacks a key or has no images.
    """
    path = Path(path)
    _need_file(path, 'annotation file')
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DatasetError(f'{path} is not valid JSON ({error}); download it again.') from None
    absent = [key for key in COCO_KEYS if not isinstance(content, dict) or key not in content]
    if absent:
        raise DatasetError(f'{path} lacks {absent} of a COCO annotation file; {REMEDY}.')
    for key in ('images', 'categories'):
        if not content[key]:
            raise DatasetError(f'{path} has no {key}; {REMEDY}.')
    return content


def find_pictures(folder: str | Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below a folder whose lower-case names end in one of the suffixes."""
    for path in Path(folder).rglob('*'):
        if path.name.lower().endswith(suffixes):
            yield path


def _type_name(cfg: Mapping[str, Any]) -> str:
    kind = cfg.get('type')
    if kind is None:
        raise DatasetError(f'A dataset config needs `type`, got the keys {sorted(cfg)}.')
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def _need_strict_guards(name: str, pipeline: Iterable[Any]) -> None:
    steps = (step for step in pipeline if isinstance(step, Mapping))
    for guard in (step for step in steps if _type_name(step) == 'LoadGuard'):
        # Left out, the limit is that of training.
        limit = guard.get('max_unreadable')
        if limit != 0:
            raise DatasetError(
                f'{name}: with test_mode=True its LoadGuard needs max_unreadable=0, since a score '
                f'over a part is false, got {limit}.'
            )


def _is_local(path: str | Path) -> bool:
    return '://' not in str(path)


def _join(cfg: Mapping[str, Any], path: str) -> Path | None:
    """Return a path of the config below its data_root, or None when it is remote storage."""
    root = str(cfg.get('data_root') or '')
    if not _is_local(path) or not _is_local(root):
        return None
    return Path(root, path).expanduser()


def _prefix(cfg: Mapping[str, Any], key: str) -> str:
    prefix = cfg.get('data_prefix') or ''
    return prefix if isinstance(prefix, str) else prefix.get(key) or ''


def _classes(cfg: Mapping[str, Any]) -> list[str] | None:
    classes = (cfg.get('metainfo') or {}).get('classes') or cfg.get('classes')
    if isinstance(classes, str):  # a file with a name in every line
        path = Path(classes)
        _need_file(path, 'file of class names')
        return path.read_text().splitlines()
    return None if classes is None else list(classes)


def _need_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise DatasetError(f'The {what} {path} does not exist; {REMEDY}.')
    if path.stat().st_size == 0:
        raise DatasetError(f'The {what} {path} is empty; {REMEDY}.')


def _need_pictures(folder: Path, suffixes: tuple[str, ...], what: str) -> None:
    if not folder.is_dir():
        raise DatasetError(f'The folder of {what} {folder} does not exist; {REMEDY}.')
    if next(find_pictures(folder, suffixes), None) is None:
        endings = ', '.join(suffixes)
        raise DatasetError(f'The folder of {what} {folder} has no files ({endings}); {REMEDY}.')


def _check_folders_of_classes(name: str, cfg: Mapping[str, Any]) -> None:
    """ImageNet and CustomDataset: a list file, or a folder for every class."""
    split = cfg.get('split') or ''
    folder = _join(cfg, _prefix(cfg, 'img_path') or split)
    if folder is None:
        return
    ann_file = cfg.get('ann_file') or ''
    if not ann_file and name == 'ImageNet' and split:
        meta = _join(cfg, f'meta/{split}.txt')
        ann_file = f'meta/{split}.txt' if meta is not None and meta.exists() else ''
    suffixes = tuple(cfg.get('extensions') or PICTURE_SUFFIXES)
    if ann_file:
        path = _join(cfg, ann_file)
        if path is not None:
            _check_list_file(path, folder, cfg.get('with_label', True))
        return
    _need_pictures(folder, suffixes, 'pictures')
    if cfg.get('with_label', True) is False or split == 'test':
        return
    with os.scandir(folder) as entries:
        found = sum(entry.is_dir() for entry in entries)
    classes = _classes(cfg)
    if classes is not None:
        expected = len(classes)
    else:
        expected = NUM_IMAGENET_CLASSES if name == 'ImageNet' else found
    if found != expected:
        raise DatasetError(
            f'{name}: {folder} has {found} class folders where {expected} are expected; {REMEDY}.'
        )
    if found == 0:
        raise DatasetError(f'{name}: {folder} has pictures but no class folders; {REMEDY}.')


def _check_list_file(path: Path, folder: Path, with_label: bool) -> None:
    _need_file(path, 'list of pictures')
    with path.open() as file:
        first = file.readline().strip()
    picture, _, label = first.rpartition(' ') if with_label else (first, '', '0')
    if not picture or not label.isdigit():
        raise DatasetError(f"{path}: expected lines 'picture label', got {first!r}; {REMEDY}.")
    if not (folder / picture).is_file():
        raise DatasetError(f'{path} lists {picture}, which is not in {folder}; {REMEDY}.')


def _check_coco(name: str, cfg: Mapping[str, Any]) -> None:
    if not cfg.get('ann_file'):
        raise DatasetError(f'{name}: the config names no ann_file; {REMEDY}.')
    path, folder = _join(cfg, cfg['ann_file']), _join(cfg, _prefix(cfg, 'img'))
    if path is not None:
        _need_file(path, 'annotation file')
        masks = _loads_masks(cfg.get('pipeline') or ())
        content = _read_checked_instances(path, BOX_KEYS | ({'segmentation'} if masks else set()))
        known = {entry.get('name') for entry in content['categories']}
        absent = [label for label in _classes(cfg) or () if label not in known]
        if absent:
            raise DatasetError(
                f'{name}: the classes {absent} of the config are not among the {len(known)} '
                f'categories of {path}; correct metainfo.classes.'
            )
    if folder is None:
        return
    _need_pictures(folder, PICTURE_SUFFIXES, 'pictures')
    for image in content['images'][:1] if path is not None else ():
        if not (folder / image['file_name']).is_file():
            raise DatasetError(
                f'{path} lists {image["file_name"]!r}, which is not in {folder}; {REMEDY}.'
            )


def _loads_masks(pipeline: Iterable[Any]) -> bool:
    """Whether a step of a pipeline, or of a guard in it, loads masks."""
    steps = [step for step in pipeline if isinstance(step, Mapping)]
    return any(
        step.get('with_mask') or _loads_masks(step.get('transforms') or ()) for step in steps
    )


def _read_checked_instances(path: Path, annotation_keys: Set[str]) -> dict[str, Any]:
    """Read an annotation file, of a large one the beginnings of its lists, and check the keys."""
    large = path.stat().st_size > PARSE_LIMIT
    content = _scan_instances(path) if large else read_instances(path)
    for what, keys in (('images', IMAGE_KEYS), ('annotations', annotation_keys)):
        for number, entry in enumerate(content[what]):
            absent = sorted(keys - entry.keys()) if isinstance(entry, dict) else sorted(keys)
            if absent:
                raise DatasetError(f'{path}: {what}[{number}] lacks {absent}; {REMEDY}.')
    return content


def _scan_instances(path: Path) -> dict[str, Any]:
    """Find the keys of a large annotation file; parse its categories and two first entries."""
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:64].lstrip()[:1] != b'{' or data[-64:].rstrip()[-1:] != b'}':
            raise DatasetError(f'{path} is not a whole JSON file; download it again.')
        absent = [key for key in COCO_KEYS if data.find(f'"{key}"'.encode()) < 0]
        if absent:
            raise DatasetError(f'{path} lacks {absent} of a COCO annotation file; {REMEDY}.')
        # The key, not a string of this value: followed by a colon and a list.
        start = data.find(b'[', data.rfind(b'"categories"'))
        text = data[start : start + 2**20].decode('utf-8', errors='replace')
        firsts = {key: _first_entry(path, data, key) for key in ('images', 'annotations')}
    try:
        categories, _ = json.JSONDecoder().raw_decode(text)
    except ValueError as error:
        raise DatasetError(
            f'{path}: its categories are not valid JSON ({error}); download it again.'
        ) from None
    return {**firsts, 'categories': categories}


def _first_entry(path: Path, data: mmap.mmap, key: str) -> list[Any]:
    """Parse the first entry of a list in a large annotation file; none of an empty list."""
    found = re.search(rb'"%s"\s*:\s*\[\s*' % key.encode(), data)
    if found is None:
        raise DatasetError(f'{path}: {key} is not a list; {REMEDY}.')
    text = data[found.end() : found.end() + 2**20].decode('utf-8', errors='replace')
    if text.startswith(']'):
        return []
    try:
        return [json.JSONDecoder().raw_decode(text)[0]]
    except ValueError as error:
        raise DatasetError(
            f'{path}: the first of its {key} is not valid JSON ({error}); download it again.'
        ) from None


def _check_segmentation(name: str, cfg: Mapping[str, Any]) -> None:
    folder = _join(cfg, _prefix(cfg, 'img_path'))
    labels = _join(cfg, _prefix(cfg, 'seg_map_path'))
    if folder is None or labels is None:
        return
    suffix, label_suffix = cfg.get('img_suffix', '.jpg'), cfg.get('seg_map_suffix', '.png')
    _need_pictures(folder, (suffix,), 'pictures')
    if not _prefix(cfg, 'seg_map_path'):
        return
    _need_pictures(labels, (label_suffix,), 'label maps')
    ann_file = _join(cfg, cfg['ann_file']) if cfg.get('ann_file') else None
    if ann_file is not None and not ann_file.is_dir():
        _need_file(ann_file, 'list of pictures')
        stems = {line.strip() for line in ann_file.read_text().splitlines() if line.strip()}
    else:
        stems = _stems(folder, suffix)
    absent = sorted(stems - _stems(labels, label_suffix))
    if absent:
        raise DatasetError(
            f'{name}: {len(absent)} of {len(stems)} pictures in {folder} have no label map in '
            f'{labels}, the first is {absent[0]}{label_suffix}; {REMEDY}.'
        )


def _stems(folder: Path, suffix: str) -> set[str]:
    paths = find_pictures(folder, (suffix,))
    return {path.relative_to(folder).as_posix()[: -len(suffix)] for path in paths}


_CHECKS = {
    'ImageNet': _check_folders_of_classes,
    'CustomDataset': _check_folders_of_classes,
    'CocoDataset': _check_coco,
    'ADE20KDataset': _check_segmentation,
    'BaseSegDataset': _check_segmentation,
}
