"""Verify a prepared copy of ImageNet-1k, COCO 2017 or ADE20K and name what is missing."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from linvis.datasets.checks import (
    BOX_KEYS,
    IMAGE_KEYS,
    PICTURE_SUFFIXES,
    DatasetError,
    read_instances,
)
from linvis.datasets.integrity import find_label_fault, find_picture_fault

NUM_CLASSES = 1000
IMAGENET_COUNTS = {'train': 1_281_167, 'val': 50_000}
COCO_COUNTS = {'train2017': 118_287, 'val2017': 5_000}
ADE_COUNTS = {'training': 20_210, 'validation': 2_000}
ADE_MAX_LABEL = 150
ANNOTATION_KEYS = BOX_KEYS | {'segmentation'}


@dataclass
class _Files:
    """What a data set consists of, in a fixed order."""

    pictures: list[Path] = field(default_factory=list)
    labels: list[Path] = field(default_factory=list)


def verify_dataset(
    kind: str,
    root: str | Path,
    *,
    any_count: bool = False,
    decode: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> Iterator[str]:
    """Look through a prepared folder.

    Args:
        kind: 'imagenet', 'coco' or 'ade'.
        root: The folder, e.g. 'data/coco'.
        any_count: Accept any number of files and class folders; for subsets.
        decode: Open every picture as well.
        workers: Processes that open files; 0 opens them in this process.
        progress: Show a progress bar on standard error.

    Yields:
        One line for every problem; none for a folder that is in order.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in _VERIFIERS:
        raise ValueError(f'kind must be one of {sorted(_VERIFIERS)}, got {kind!r}.')
    root = Path(root)
    if not root.is_dir():
        yield f'{root}: no such folder'
        return
    files = _Files()
    yield from _VERIFIERS[kind](root, any_count, files)
    if files.labels:
        yield from _open_all(_label_problem, files.labels, workers, progress, 'label maps')
    if decode:
        yield from _open_all(_picture_problem, files.pictures, workers, progress, 'pictures')


def _verify_imagenet(root: Path, any_count: bool, files: _Files) -> Iterator[str]:
    classes: dict[str, set[str]] = {}
    for split, count in IMAGENET_COUNTS.items():
        folder = root / split
        if not folder.is_dir():
            yield f'{folder}: no such folder'
            continue
        listed = root / 'meta' / f'{split}.txt'
        found = sorted(_files_below(folder))
        files.pictures += found
        if listed.is_file():
            yield from _listed_problems(listed, folder, found)
        else:
            classes[split] = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
            yield from _class_folder_problems(folder, found, classes[split], any_count)
        if not found:
            yield f'{folder}: no pictures'
        elif not any_count and len(found) != count:
            yield f'{folder}: {len(found)} pictures, ImageNet-1k has {count}'
    if len(classes) == 2:
        for name in sorted(classes['train'] ^ classes['val']):
            side = 'val' if name in classes['train'] else 'train'
            yield f'{root / side / name}: no such folder, the other split has it'


def _class_folder_problems(
    folder: Path, found: Sequence[Path], classes: set[str], any_count: bool
) -> Iterator[str]:
    if not any_count and len(classes) != NUM_CLASSES:
        yield f'{folder}: {len(classes)} class folders, ImageNet-1k has {NUM_CLASSES}'
    loose = [path for path in found if path.parent == folder]
    if loose:
        yield (
            f'{folder}: {len(loose)} pictures lie outside of class folders; sort them into '
            f'folders or give their labels in meta/{folder.name}.txt'
        )
    filled = {path.relative_to(folder).parts[0] for path in found}
    for name in sorted(classes - filled):
        yield f'{folder / name}: no pictures'


def _listed_problems(listed: Path, folder: Path, found: Sequence[Path]) -> Iterator[str]:
    """Compare a list of lines 'picture label' with the pictures of a folder."""
    names = set()
    for number, line in enumerate(listed.read_text().splitlines(), 1):
        name, _, label = line.strip().rpartition(' ')
        if not name or not label.isdigit():
            yield f"{listed}:{number}: expected 'picture label', got {line!r}"
        else:
            names.add(name)
    present = {path.relative_to(folder).as_posix() for path in found}
    for name in sorted(names - present):
        yield f'{folder / name}: no such file, {listed.name} lists it'


def _verify_coco(root: Path, any_count: bool, files: _Files) -> Iterator[str]:
    for split, count in COCO_COUNTS.items():
        folder = root / split
        exists = folder.is_dir()
        if not exists:
            yield f'{folder}: no such folder'
        try:
            content = read_instances(root / 'annotations' / f'instances_{split}.json')
        except DatasetError as error:
            yield str(error)
            continue
        name = f'instances_{split}.json'
        yield from _annotation_problems(name, content)
        present = {path.name: path for path in _files_below(folder)} if exists else {}
        listed = sorted(str(image.get('file_name')) for image in content['images'])
        files.pictures += [present[file] for file in listed if file in present]
        if exists:
            for file in listed:
                if file not in present:
                    yield f'{folder / file}: no such file, {name} lists it'
        if not any_count and len(listed) != count:
            yield f'{name}: {len(listed)} pictures, COCO 2017 has {count}'


def _annotation_problems(name: str, content: dict[str, Any]) -> Iterator[str]:
    images = {image.get('id') for image in content['images']}
    categories = {category.get('id') for category in content['categories']}
    for image in content['images']:
        absent = IMAGE_KEYS - set(image)
        if absent:
            yield f'{name}: picture {image.get("id")} lacks {sorted(absent)}'
    if not content['annotations']:
        yield f'{name}: no annotations'
    for annotation in content['annotations']:
        number = annotation.get('id')
        absent = ANNOTATION_KEYS - set(annotation)
        if absent:
            yield f'{name}: annotation {number} lacks {sorted(absent)}'
        elif annotation['image_id'] not in images:
            yield f'{name}: annotation {number} is of unknown picture {annotation["image_id"]}'
        elif annotation['category_id'] not in categories:
            yield f'{name}: annotation {number} has unknown category {annotation["category_id"]}'


def _verify_ade(root: Path, any_count: bool, files: _Files) -> Iterator[str]:
    for split, count in ADE_COUNTS.items():
        folders = root / 'images' / split, root / 'annotations' / split
        absent = [folder for folder in folders if not folder.is_dir()]
        if absent:
            yield from (f'{folder}: no such folder' for folder in absent)
            continue
        found = [{path.stem: path for path in _files_below(folder)} for folder in folders]
        files.pictures += [path for _, path in sorted(found[0].items())]
        files.labels += [path for _, path in sorted(found[1].items())]
        if not found[0]:
            yield f'{folders[0]}: no pictures'
        elif not any_count and len(found[0]) != count:
            yield f'{folders[0]}: {len(found[0])} pictures, ADE20K has {count}'
        for stem in sorted(set(found[0]) - set(found[1])):
            yield f'{folders[1] / stem}.png: no such file, its picture exists'
        for stem in sorted(set(found[1]) - set(found[0])):
            yield f'{folders[0] / stem}.jpg: no such file, its label map exists'


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(PICTURE_SUFFIXES):
                yield Path(parent, name)


def _picture_problem(path: Path) -> str | None:
    fault = _examine(path, find_picture_fault)
    return f'{path}: {fault}' if fault else None


def _label_problem(path: Path) -> str | None:
    fault = _examine(path, lambda data: find_label_fault(data, ADE_MAX_LABEL))
    return f'{path}: {fault}' if fault else None


def _examine(path: Path, check: Callable[[bytes], str | None]) -> str | None:
    try:
        return check(path.read_bytes())
    except OSError as error:
        return f'cannot be read ({error.strerror})'


def _open_all(
    check: Callable[[Path], str | None],
    paths: Sequence[Path],
    workers: int,
    progress: bool,
    what: str,
) -> Iterator[str]:
    def watched(results: Iterable[str | None]) -> Iterator[str]:
        bar = tqdm(results, total=len(paths), desc=what, disable=not progress, unit='file')
        yield from (problem for problem in bar if problem)

    if workers == 0:
        yield from watched(map(check, paths))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from watched(pool.map(check, paths, chunksize=64))


_VERIFIERS = {'imagenet': _verify_imagenet, 'coco': _verify_coco, 'ade': _verify_ade}
