"""The embedded data sets themselves."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image
from pycocotools.coco import COCO

import linvis.compat
from linvis.datasets import check_dataset_cfg
from linvis.datasets.verify import verify_dataset

MINI = Path(__file__).parents[2] / 'data' / 'mini'
LOAD = {'type': 'LoadImageFromFile'}
LICENCES = {'CC BY 2.0', 'CC BY-SA 2.0', 'No known copyright restrictions'}


@pytest.fixture(scope='module')
def credit_rows():
    with (MINI / 'CREDITS.tsv').open(newline='') as file:
        return list(csv.DictReader(file, delimiter='\t'))


@pytest.mark.parametrize('kind', ['imagenet', 'coco', 'ade'])
def test_mini_is_whole_and_every_picture_opens(kind):
    assert list(verify_dataset(kind, MINI / kind, any_count=True, decode=True)) == []


def test_mini_pictures_are_all_credited(credit_rows):
    credited = [file for row in credit_rows for file in row['files'].split(' ')]
    pictures = {path.relative_to(MINI).as_posix() for path in MINI.rglob('*.jpg')}
    assert len(credited) == len(set(credited))
    assert set(credited) == pictures


def test_mini_credits_are_complete_and_free(credit_rows):
    assert {row['licence'] for row in credit_rows} <= LICENCES
    for row in credit_rows:
        assert row['source_page'].startswith('https://www.flickr.com/')
        assert row['licence_url'].startswith('http')
        assert 'resized' in row['changes']


@pytest.mark.parametrize('split', ['train2017', 'val2017'])
def test_mini_annotation_files_name_free_licences_only(split):
    content = json.loads((MINI / 'coco' / 'annotations' / f'instances_{split}.json').read_text())
    assert {image['license'] for image in content['images']} <= {4, 5, 7}
    assert len(content['categories']) == 80


@pytest.mark.parametrize('split', ['train2017', 'val2017'])
def test_mini_masks_decode_and_fit_their_boxes(split):
    coco = COCO(str(MINI / 'coco' / 'annotations' / f'instances_{split}.json'))
    for image in coco.imgs.values():
        with Image.open(MINI / 'coco' / split / image['file_name']) as picture:
            assert picture.size == (image['width'], image['height'])
    distances = []
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        x, y, w, h = annotation['bbox']
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        distances.append(np.abs(np.subtract(found, [x, y, x + w, y + h])).max())
        assert mask.sum() == pytest.approx(annotation['area'], rel=0.5, abs=20)
    # Thin parts of polygons vanish between pixels.
    assert np.quantile(distances, 0.98) <= 3
    assert np.median(distances) <= 1


def test_mini_label_maps_have_the_size_of_their_pictures():
    paths = sorted((MINI / 'ade' / 'images').rglob('*.jpg'))
    assert len(paths) > 30
    for path in paths:
        name = path.relative_to(MINI / 'ade' / 'images').with_suffix('.png')
        with Image.open(path) as picture, Image.open(MINI / 'ade' / 'annotations' / name) as labels:
            assert picture.size == labels.size
            assert labels.mode == 'L'


def test_mini_classes_are_balanced_and_in_both_splits():
    counts = {
        split: {folder.name: len(list(folder.iterdir())) for folder in (MINI / split).iterdir()}
        for split in ('imagenet/train', 'imagenet/val')
    }
    train, val = counts.values()
    assert train.keys() == val.keys()
    assert len(train) >= 6
    assert max(train.values()) <= 3 * min(train.values())


def test_mini_photographs_are_on_one_side_only(credit_rows):
    training, validation = {'train', 'train2017', 'training'}, {'val', 'val2017', 'validation'}
    for row in credit_rows:
        parts = {part for file in row['files'].split(' ') for part in file.split('/')}
        assert not (parts & training and parts & validation), row['photograph']
    assert len({row['source_page'] for row in credit_rows}) == len(credit_rows)


def test_mini_is_below_eight_megabytes():
    assert sum(path.stat().st_size for path in MINI.rglob('*') if path.is_file()) < 8 * 2**20


def test_mini_pictures_carry_no_metadata():
    for path in MINI.rglob('*.jpg'):
        with Image.open(path) as picture:
            assert not picture.getexif()


def load_through(scope, cfg, steps):
    """Build a dataset as a run does and load all of it, strictly."""
    linvis.compat.install()
    with DefaultScope.overwrite_default_scope(scope):
        guard = {'type': 'linvis.LoadGuard', 'transforms': [LOAD, *steps], 'max_unreadable': 0}
        check_dataset_cfg(cfg)
        dataset = DATASETS.build({**cfg, 'pipeline': [guard]})
        return dataset, [dataset[index] for index in range(len(dataset))]


def test_mini_imagenet_loads_through_mmpretrain():
    cfg = {'type': 'CustomDataset', 'data_root': str(MINI / 'imagenet'), 'data_prefix': 'train'}
    dataset, samples = load_through('mmpretrain', cfg, [])
    assert len(dataset.metainfo['classes']) == 6
    assert {sample['gt_label'] for sample in samples} == set(range(6))


def test_mini_coco_loads_through_mmdet():
    cfg = {
        'type': 'CocoDataset',
        'data_root': str(MINI / 'coco'),
        'ann_file': 'annotations/instances_train2017.json',
        'data_prefix': {'img': 'train2017/'},
    }
    step = {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True}
    _, samples = load_through('mmdet', cfg, [step])
    assert len(samples) == 73
    assert sum(len(sample['gt_bboxes']) for sample in samples) == 723
    assert all(len(sample['gt_masks']) == len(sample['gt_bboxes']) for sample in samples)


def test_mini_ade_loads_through_mmseg():
    prefix = {'img_path': 'images/training', 'seg_map_path': 'annotations/training'}
    cfg = {'type': 'ADE20KDataset', 'data_root': str(MINI / 'ade'), 'data_prefix': prefix}
    dataset, samples = load_through('mmseg', cfg, [{'type': 'LoadAnnotations'}])
    assert len(dataset.metainfo['classes']) == 150
    labels = set(np.concatenate([np.unique(sample['gt_seg_map']) for sample in samples]))
    assert 255 in labels
    assert max(labels - {255}) < 150
