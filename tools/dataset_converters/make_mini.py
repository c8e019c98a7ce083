"""Make the embedded mini data sets from freely licensed pictures of COCO.

Reads a COCO-layout folder whose JSON files record a licence for every picture, and an
ADE20K-layout folder of label maps over COCO pictures (`coco_<number>`) with a `credits.tsv`. Keeps
only pictures under CC BY, CC BY-SA or without known restrictions, and writes three small folders in
the layouts of ImageNet-1k, COCO 2017 and ADE20K, with `CREDITS.tsv`.

    python tools/dataset_converters/make_mini.py --coco COCO_FOLDER --ade ADE_FOLDER --out data/mini

The output is deterministic: the same sources and the same Pillow give the same bytes.
"""

import argparse
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

# COCO's number of the licence -> short name; all others are refused.
ALLOWED_LICENCES = {4: 'CC BY 2.0', 5: 'CC BY-SA 2.0', 7: 'No known copyright restrictions'}
# Super-categories of COCO with enough large objects; the folder names of the classification set.
CLASSES = ('animal', 'food', 'furniture', 'kitchen', 'person', 'vehicle')
# The region of a table shows what stands on it.
CLUTTERED = {'dining table'}
SPLITS = {'train2017': ('train', 'training'), 'val2017': ('val', 'validation')}
CREDIT_FIELDS = (
    'photograph',
    'licence',
    'licence_url',
    'source_page',
    'picture_url',
    'changes',
    'files',
)


class SourceError(ValueError):
    """The source folders do not hold what the converter needs."""


@dataclass
class Photograph:
    """One photograph: where it comes from and which files were made from it."""

    number: int
    licence: int
    url: str
    files: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def add(self, file: Path, change: str) -> None:
        """Note a file made from this photograph and what was done to it."""
        self.files.append(file.as_posix())
        if change not in self.changes:
            self.changes.append(change)


@dataclass
class Crop:
    """A candidate for the classification set."""

    label: str
    annotation: int
    picture: int
    window: tuple[int, int, int, int]
    size: float


def source_page(url: str) -> str:
    """Return the Flickr page of a picture (it names the author), else the address itself."""
    match = re.search(r'staticflickr\.com/\d+/(\d+)_', url)
    return f'https://www.flickr.com/photo.gne?id={match.group(1)}' if match else url


def load_json(path: Path) -> dict[str, Any]:
    """Read one instances JSON and check its keys."""
    if not path.is_file():
        raise SourceError(f'Expected a COCO annotation file at {path}; it does not exist.')
    content = json.loads(path.read_text())
    absent = {'images', 'annotations', 'categories', 'licenses'} - set(content)
    if absent:
        raise SourceError(f'{path} lacks the keys {sorted(absent)} of a COCO annotation file.')
    for image in content['images']:
        if 'license' not in image or not image.get('flickr_url'):
            raise SourceError(
                f"{path}: picture {image.get('file_name')} lacks 'license' or 'flickr_url'."
            )
    return content


def resized(picture: Image.Image, long_side: int) -> Image.Image:
    """Return the picture in RGB, reduced to the given long side; never enlarged."""
    picture = picture.convert('RGB')
    ratio = long_side / max(picture.size)
    if ratio >= 1:
        return picture
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def save_jpeg(picture: Image.Image, path: Path, quality: int) -> None:
    """Write a JPEG without metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, 'JPEG', quality=quality, optimize=True)


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """Return the mask (height, width), uint8, of a COCO run-length code, compressed or not."""
    if isinstance(segmentation['counts'], list):
        height, width = segmentation['size']
        segmentation = mask_utils.frPyObjects(segmentation, height, width)
    return np.asarray(mask_utils.decode(segmentation))


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Return the uncompressed run-length code of a mask, as COCO's JSON files have it."""
    flat = mask.flatten(order='F').astype(np.uint8)
    edges = np.flatnonzero(
        np.diff(np.concatenate([[0], flat]))
    )  # the first run counts zeros, maybe none
    counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return {'counts': counts.tolist(), 'size': list(mask.shape)}


def scale_annotation(
    annotation: dict[str, Any], old: tuple[int, int], new: tuple[int, int]
) -> dict[str, Any] | None:
    """Scale one annotation from picture size `old` to `new`, both (width, height).

    Returns:
        The new annotation, or None when nothing of the object is left at the new size.
    """
    sx, sy = new[0] / old[0], new[1] / old[1]
    result = dict(annotation)
    x, y, w, h = annotation['bbox']
    left, top = min(max(x * sx, 0), new[0]), min(max(y * sy, 0), new[1])
    right, bottom = min((x + w) * sx, new[0]), min((y + h) * sy, new[1])
    result['bbox'] = [round(v, 2) for v in (left, top, right - left, bottom - top)]
    segmentation = annotation['segmentation']
    if isinstance(segmentation, dict):
        mask = Image.fromarray(decode_rle(segmentation)).resize(new, Image.Resampling.NEAREST)
        result['segmentation'] = encode_rle(np.asarray(mask))
        result['area'] = int(np.asarray(mask).sum())
    else:
        limits, scales = np.array(new), np.array([sx, sy])
        result['segmentation'] = [
            np.clip(np.reshape(polygon, (-1, 2)) * scales, 0, limits).round(2).flatten().tolist()
            for polygon in segmentation
        ]
        result['area'] = round(annotation['area'] * sx * sy, 2)
    return result if annotation_mask(result, new).any() and min(result['bbox'][2:]) >= 1 else None


def annotation_mask(annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return the mask (height, width) of an annotation in a picture of size (width, height)."""
    segmentation = annotation['segmentation']
    if isinstance(segmentation, dict):
        return decode_rle(segmentation)
    return np.asarray(
        mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(segmentation, size[1], size[0])))
    )


def convert_coco(
    source: Path, out: Path, split: str, content: dict[str, Any], long_side: int, quality: int
) -> dict[int, Photograph]:
    """Write one split of the detection set; returns its photographs by COCO's number."""
    kept = [image for image in content['images'] if image['license'] in ALLOWED_LICENCES]
    photographs, sizes, images = {}, {}, []
    for image in sorted(kept, key=lambda image: image['id']):
        with Image.open(source / split / image['file_name']) as picture:
            small = resized(picture, long_side)
        file = Path('coco', split, image['file_name'])
        save_jpeg(small, out / file, quality)
        number = image['id']
        photographs[number] = Photograph(number, image['license'], image['flickr_url'])
        photographs[number].add(file, f'resized to {small.width} x {small.height}')
        sizes[number] = ((image['width'], image['height']), small.size)
        images.append({**image, 'width': small.width, 'height': small.height})
    annotations = [
        scaled
        for annotation in sorted(content['annotations'], key=lambda annotation: annotation['id'])
        if annotation['image_id'] in photographs
        and (scaled := scale_annotation(annotation, *sizes[annotation['image_id']]))
    ]
    result = {
        'info': {
            'description': f'Freely licensed, resized pictures of COCO 2017 ({split})',
            'url': 'https://cocodataset.org',
            'version': '1.0',
            'year': 2017,
            'contributor': 'COCO Consortium (annotations, CC BY 4.0); pictures: CREDITS.tsv',
        },
        'licenses': [entry for entry in content['licenses'] if entry['id'] in ALLOWED_LICENCES],
        'images': images,
        'annotations': annotations,
        'categories': content['categories'],
    }
    path = out / 'coco' / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, separators=(',', ':')) + '\n')
    return photographs


def crop_window(
    box: Iterable[float], size: tuple[int, int], margin: float
) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom: the box with a margin, as square as the picture allows."""
    x, y, w, h = box
    side = max(w, h) * (1 + 2 * margin)
    edges = []
    for start, length, limit in ((x, w, size[0]), (y, h, size[1])):
        extent = min(side, limit)
        first = min(max(start + length / 2 - extent / 2, 0), limit - extent)
        edges.append((round(first), round(first + extent)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Return intersection over union of two windows."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def crop_candidates(content: dict[str, Any], min_side: int) -> dict[str, list[Crop]]:
    """Return per class the large objects: the largest of every picture, then the second largest."""
    sizes = {
        image['id']: (image['width'], image['height'])
        for image in content['images']
        if image['license'] in ALLOWED_LICENCES
    }
    labels = {
        entry['id']: entry['supercategory']
        for entry in content['categories']
        if entry['name'] not in CLUTTERED
    }
    groups: dict[str, dict[int, list[Crop]]] = {label: defaultdict(list) for label in CLASSES}
    for annotation in content['annotations']:
        label, number = labels.get(annotation['category_id']), annotation['image_id']
        width, height = annotation['bbox'][2:]
        if label is None or label not in groups or number not in sizes or annotation['iscrowd']:
            continue
        if max(width, height) < min_side or min(width, height) < min_side / 2:
            continue
        window = crop_window(annotation['bbox'], sizes[number], margin=0.1)
        area = (window[2] - window[0]) * (window[3] - window[1])
        # A window mostly filled by something else would teach the wrong class.
        if annotation['area'] < 0.15 * area:
            continue
        crop = Crop(label, annotation['id'], number, window, width * height)
        groups[label][number].append(crop)
    result = {}
    for label, pictures in groups.items():
        ranked = []
        for crops in pictures.values():
            crops.sort(key=lambda crop: (-crop.size, crop.annotation))
            ranked += list(enumerate(crops))
        ranked.sort(key=lambda pair: (pair[0], -pair[1].size, pair[1].annotation))
        result[label] = [crop for _, crop in ranked]
    return result


def select_crops(candidates: dict[str, list[Crop]], limit: int) -> list[Crop]:
    """Choose at most `limit` crops of each class, rare classes first, windows apart."""
    chosen: list[Crop] = []
    for label in sorted(candidates, key=lambda label: (len(candidates[label]), label)):
        taken = 0
        for crop in candidates[label]:
            rivals = (other for other in chosen if other.picture == crop.picture)
            if taken < limit and all(overlap(crop.window, other.window) < 0.5 for other in rivals):
                chosen.append(crop)
                taken += 1
    return sorted(chosen, key=lambda crop: (crop.label, crop.picture, crop.annotation))


def convert_crops(
    source: Path,
    out: Path,
    split: str,
    content: dict[str, Any],
    photographs: dict[int, Photograph],
    options: argparse.Namespace,
) -> None:
    """Write one split of the classification set."""
    names = {image['id']: image['file_name'] for image in content['images']}
    candidates = crop_candidates(content, options.crop_min)
    for crop in select_crops(candidates, options.crops[split == 'val2017']):
        with Image.open(source / split / names[crop.picture]) as picture:
            small = resized(picture.crop(crop.window), options.crop_side)
        folder = Path('imagenet', SPLITS[split][0], crop.label)
        file = folder / f'{crop.picture:012d}_{crop.annotation}.jpg'
        save_jpeg(small, out / file, options.quality)
        photographs[crop.picture].add(file, 'cropped to objects and resized')


def convert_ade(
    source: Path,
    out: Path,
    photographs: dict[int, Photograph],
    splits: dict[int, str],
    licence_numbers: dict[str, int],
    quality: int,
    long_side: int,
) -> Counter[str]:
    """Write the segmentation set; returns how many pictures were refused, by licence."""
    credits_path = source / 'credits.tsv'
    if not credits_path.is_file():
        raise SourceError(f'Expected {credits_path} with the licence and source of every picture.')
    refused: Counter[str] = Counter()
    with credits_path.open(newline='') as file:
        rows = sorted(csv.DictReader(file, delimiter='\t'), key=lambda row: row['picture'])
    for row in rows:
        licence = licence_numbers.get(row['licence'], 0)
        match = re.fullmatch(r'coco_(\d+)', Path(row['picture']).name)
        if licence not in ALLOWED_LICENCES or match is None:
            refused[row['licence']] += 1
            continue
        number = int(match.group(1))
        # COCO's own split where it is known, so that a photograph is on one side in all three sets.
        drawn = 'val2017' if number % 2 else 'train2017'
        folder = SPLITS[splits.get(number, drawn)][1]
        with Image.open(source / 'images' / f'{row["picture"]}.jpg') as picture:
            small = resized(picture, long_side)
        with Image.open(source / 'annotations' / f'{row["picture"]}.png') as labels:
            label_map = labels.resize(small.size, Image.Resampling.NEAREST)
        if label_map.mode != 'L' or np.asarray(label_map).max() > 150:
            raise SourceError(
                f'{row["picture"]}: expected an 8-bit label map with values 0 to 150.'
            )
        name = f'{number:012d}'
        photograph = photographs.setdefault(number, Photograph(number, licence, row['source page']))
        if photograph.licence != licence:
            raise SourceError(f'{row["picture"]}: the two sources name different licences.')
        file_name = Path('ade', 'images', folder, f'{name}.jpg')
        save_jpeg(small, out / file_name, quality)
        photograph.add(file_name, f'resized to {small.width} x {small.height}')
        map_name = Path('ade', 'annotations', folder, f'{name}.png')
        (out / map_name).parent.mkdir(parents=True, exist_ok=True)
        label_map.save(out / map_name, optimize=True)
    return refused


def write_credits(path: Path, photographs: dict[int, Photograph], urls: dict[int, str]) -> None:
    """Write one row for every photograph: licence, source, changes, files."""
    with path.open('w', newline='') as file:
        writer = csv.writer(file, delimiter='\t', lineterminator='\n')
        writer.writerow(CREDIT_FIELDS)
        for number, entry in sorted(photographs.items()):
            licence, page = ALLOWED_LICENCES[entry.licence], source_page(entry.url)
            changes, files = '; '.join(entry.changes), ' '.join(sorted(entry.files))
            writer.writerow(
                (f'{number:012d}', licence, urls[entry.licence], page, entry.url, changes, files)
            )


def make_mini(options: argparse.Namespace) -> dict[str, int]:
    """Write the three sets and `CREDITS.tsv`; returns a few numbers for the user.

    Raises:
        SourceError: If a source lacks what is needed or the output folder holds a set.
    """
    for name in ('imagenet', 'coco', 'ade'):
        if (options.out / name).exists():
            raise SourceError(
                f'{options.out / name} exists already; remove it or name another --out.'
            )
    photographs: dict[int, Photograph] = {}
    splits: dict[int, str] = {}
    names: dict[str, int] = {}
    urls: dict[int, str] = {}
    refused: Counter[str] = Counter()
    for split in SPLITS:
        content = load_json(options.coco / 'annotations' / f'instances_{split}.json')
        by_number = {entry['id']: entry['name'] for entry in content['licenses']}
        names.update({name: number for number, name in by_number.items()})
        urls.update({entry['id']: entry['url'] for entry in content['licenses']})
        refused.update(
            by_number.get(image['license'], 'unknown')
            for image in content['images']
            if image['license'] not in ALLOWED_LICENCES
        )
        found = convert_coco(
            options.coco, options.out, split, content, options.long_side, options.quality
        )
        convert_crops(options.coco, options.out, split, content, found, options)
        photographs.update(found)
        splits.update(dict.fromkeys((image['id'] for image in content['images']), split))
    refused += convert_ade(
        options.ade, options.out, photographs, splits, names, options.quality, options.long_side
    )
    write_credits(options.out / 'CREDITS.tsv', photographs, urls)
    numbers = {f'refused ({name})': count for name, count in sorted(refused.items())}
    return {'photographs': len(photographs), **numbers}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--coco', type=Path, required=True, help='folder in the layout of COCO 2017'
    )
    parser.add_argument(
        '--ade', type=Path, required=True, help='folder of label maps with credits.tsv'
    )
    parser.add_argument('--out', type=Path, required=True, help='folder to write the three sets to')
    parser.add_argument('--long-side', type=int, default=320, help='of coco and ade, in pixels')
    parser.add_argument('--crop-side', type=int, default=128, help='long side of a crop, in pixels')
    parser.add_argument('--crop-min', type=int, default=20, help='least long side of an object')
    parser.add_argument(
        '--crops', type=int, nargs=2, default=(45, 20), help='most crops of a class: train, val'
    )
    parser.add_argument('--quality', type=int, default=85, help='of the JPEG files')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the converter; returns the exit status."""
    try:
        numbers = make_mini(parse_args(arguments))
    except SourceError as error:
        print(f'make_mini: {error}', file=sys.stderr)
        return 1
    for name, count in numbers.items():
        print(f'{name}: {count}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
