import io
import json

import numpy as np
import pytest
from PIL import Image

from linvis.datasets import verify
from linvis.datasets.verify import verify_dataset


def problems(kind, root, **options):
    return list(verify_dataset(kind, root, **{'any_count': True, **options}))


def save(path, mode='RGB', value=3, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, 'PNG' if path.suffix == '.png' else 'JPEG')
    path.write_bytes(buffer.getvalue())


@pytest.fixture
def imagenet(tmp_path):
    for split in ('train', 'val'):
        for name in ('n01', 'n02'):
            save(tmp_path / split / name / 'a.JPEG')
    return tmp_path


@pytest.fixture
def coco(tmp_path):
    annotation = {
        'id': 5,
        'image_id': 1,
        'category_id': 7,
        'bbox': [0, 0, 2, 2],
        'area': 4,
        'iscrowd': 0,
        'segmentation': [[0, 0, 2, 0, 2, 2]],
    }
    content = {
        'images': [{'id': 1, 'file_name': 'a.jpg', 'width': 8, 'height': 8}],
        'annotations': [annotation],
        'categories': [{'id': 7, 'name': 'cat'}],
    }
    for split in ('train2017', 'val2017'):
        save(tmp_path / split / 'a.jpg')
        path = tmp_path / 'annotations' / f'instances_{split}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def ade(tmp_path):
    for split in ('training', 'validation'):
        save(tmp_path / 'images' / split / 'a.jpg')
        save(tmp_path / 'annotations' / split / 'a.png', 'L', 150)
    return tmp_path


def edit(root, change):
    path = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('kind', ['imagenet', 'coco', 'ade'])
@pytest.mark.parametrize('workers', [0, 2])
def test_whole_folder_has_no_problems(kind, workers, request):
    root = request.getfixturevalue(kind)
    assert problems(kind, root, decode=True, workers=workers) == []


@pytest.mark.parametrize('kind', ['imagenet', 'coco', 'ade'])
def test_missing_folder_is_named(kind, tmp_path):
    assert problems(kind, tmp_path / 'none') == [f'{tmp_path / "none"}: no such folder']


@pytest.mark.parametrize('kind', ['imagenet', 'coco', 'ade'])
def test_empty_folder_has_a_problem_for_each_split(kind, tmp_path):
    text = '\n'.join(problems(kind, tmp_path))
    splits = {'imagenet': verify.IMAGENET_COUNTS, 'coco': verify.COCO_COUNTS}
    for split in splits.get(kind, verify.ADE_COUNTS):
        assert split in text


@pytest.mark.parametrize(
    ('kind', 'lines'),
    [
        ('imagenet', ['1 pictures', '1281167', '50000', '2 class folders']),
        ('coco', ['1 pictures, COCO 2017 has 118287', '1 pictures, COCO 2017 has 5000']),
        ('ade', ['1 pictures, ADE20K has 20210', '1 pictures, ADE20K has 2000']),
    ],
)
def test_counts_are_compared_with_the_official_ones(kind, lines, request):
    root = request.getfixturevalue(kind)
    if kind == 'imagenet':
        (root / 'val' / 'n01' / 'a.JPEG').unlink()
    text = '\n'.join(problems(kind, root, any_count=False))
    assert [line for line in lines if line not in text] == []


@pytest.mark.parametrize('kind', ['imagenet', 'coco', 'ade'])
def test_truncated_picture_is_found_by_decoding(kind, request):
    root = request.getfixturevalue(kind)
    path = next(path for path in sorted(root.rglob('a.*')) if path.suffix in ('.jpg', '.JPEG'))
    path.write_bytes(path.read_bytes()[:-2])
    assert problems(kind, root) == []
    (line,) = problems(kind, root, decode=True)
    assert line == f'{path}: the JPEG is truncated (no end-of-image marker)'


def test_unreadable_picture_is_a_problem_not_a_crash(imagenet):
    path = imagenet / 'val' / 'n01' / 'a.JPEG'
    path.unlink()
    path.symlink_to(imagenet / 'none')
    (line,) = problems('imagenet', imagenet, decode=True)
    assert line == f'{path}: cannot be read (No such file or directory)'


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'voc'"):
        problems('voc', tmp_path)


def test_imagenet_class_folders_must_agree_and_be_filled(imagenet):
    (imagenet / 'val' / 'n03').mkdir()
    assert problems('imagenet', imagenet) == [
        f'{imagenet / "val" / "n03"}: no pictures',
        f'{imagenet / "train" / "n03"}: no such folder, the other split has it',
    ]


def test_imagenet_flat_validation_folder_is_explained(imagenet):
    (imagenet / 'val' / 'n02' / 'a.JPEG').rename(imagenet / 'val' / 'b.JPEG')
    (imagenet / 'val' / 'n02').rmdir()
    text = '\n'.join(problems('imagenet', imagenet))
    assert '1 pictures lie outside of class folders' in text
    assert 'meta/val.txt' in text


def test_imagenet_flat_validation_folder_with_labels_is_fine(imagenet):
    (imagenet / 'val' / 'n02' / 'a.JPEG').rename(imagenet / 'val' / 'b.JPEG')
    listed = imagenet / 'meta' / 'val.txt'
    listed.parent.mkdir()
    listed.write_text('b.JPEG 1\nn01/a.JPEG 0\n')
    assert problems('imagenet', imagenet) == []
    listed.write_text('b.JPEG\nc.JPEG 0\n')
    assert problems('imagenet', imagenet) == [
        f"{listed}:1: expected 'picture label', got 'b.JPEG'",
        f'{imagenet / "val" / "c.JPEG"}: no such file, val.txt lists it',
    ]


def test_coco_picture_of_the_json_must_exist(coco):
    (coco / 'val2017' / 'a.jpg').unlink()
    assert problems('coco', coco) == [
        f'{coco / "val2017" / "a.jpg"}: no such file, instances_val2017.json lists it'
    ]


@pytest.mark.parametrize(
    ('change', 'line'),
    [
        (lambda content: content['images'][0].pop('width'), "picture 1 lacks ['width']"),
        (lambda content: content['annotations'][0].pop('bbox'), "annotation 5 lacks ['bbox']"),
        (lambda content: content['annotations'][0].update(image_id=9), '5 is of unknown picture 9'),
        (lambda content: content['annotations'][0].update(category_id=9), 'unknown category 9'),
        (lambda content: content['annotations'].clear(), 'no annotations'),
        (lambda content: content.pop('categories'), "lacks ['categories']"),
    ],
)
def test_coco_annotations_must_be_consistent(coco, change, line):
    edit(coco, change)
    (found,) = problems('coco', coco)
    assert 'instances_val2017.json' in found
    assert line in found


def test_coco_annotation_file_must_exist(coco):
    (coco / 'annotations' / 'instances_train2017.json').unlink()
    (line,) = problems('coco', coco)
    assert 'instances_train2017.json does not exist' in line


def test_ade_pictures_and_label_maps_must_pair(ade):
    (ade / 'annotations' / 'training' / 'a.png').rename(ade / 'annotations' / 'training' / 'b.png')
    assert problems('ade', ade) == [
        f'{ade / "annotations" / "training" / "a.png"}: no such file, its picture exists',
        f'{ade / "images" / "training" / "b.jpg"}: no such file, its label map exists',
    ]


@pytest.mark.parametrize(
    ('mode', 'value', 'reason'),
    [('L', 151, 'this map has 151'), ('RGB', (1, 1, 1), 'mode RGB'), ('I;16', 3, 'mode I;16')],
)
def test_ade_labels_must_be_in_range_and_8_bit(ade, mode, value, reason):
    path = ade / 'annotations' / 'validation' / 'a.png'
    if mode == 'I;16':
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(path)
    else:
        save(path, mode, value)
    (line,) = problems('ade', ade)
    assert line.startswith(f'{path}: ')
    assert reason in line
