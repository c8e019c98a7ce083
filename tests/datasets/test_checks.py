import json
from pathlib import Path

import pytest

from linvis.datasets import DatasetError, check_dataset_cfg, check_evaluator_cfg, checks

MINI = Path(__file__).parents[2] / 'data' / 'mini'
CONTENT = {
    'images': [{'id': 1, 'file_name': 'a.jpg', 'width': 48, 'height': 32}],
    'annotations': [],
    'categories': [{'id': 1, 'name': 'cat'}],
}


def fails(cfg, *parts):
    with pytest.raises(DatasetError) as error:
        check_dataset_cfg(cfg)
    text = str(error.value)
    assert '\n' not in text
    assert text.endswith('.')
    assert [part for part in parts if part not in text] == []


@pytest.fixture
def classes(tmp_path):
    """A classification folder and the config of it."""
    for name in ('cat', 'dog'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        (tmp_path / 'train' / name / 'a.JPEG').write_bytes(b'x')
    root = str(tmp_path)
    return {'type': 'mmpretrain.CustomDataset', 'data_root': root, 'data_prefix': 'train'}


@pytest.fixture
def coco(tmp_path):
    (tmp_path / 'train2017').mkdir()
    (tmp_path / 'train2017' / 'a.jpg').write_bytes(b'x')
    (tmp_path / 'instances.json').write_text(json.dumps(CONTENT))
    return {
        'type': 'CocoDataset',
        'data_root': str(tmp_path),
        'ann_file': 'instances.json',
        'data_prefix': {'img': 'train2017/'},
    }


@pytest.fixture
def ade(tmp_path):
    for folder, suffix in (('images', 'jpg'), ('annotations', 'png')):
        (tmp_path / folder / 'training').mkdir(parents=True)
        for name in 'ab':
            (tmp_path / folder / 'training' / f'{name}.{suffix}').write_bytes(b'x')
    prefix = {'img_path': 'images/training', 'seg_map_path': 'annotations/training'}
    return {'type': 'mmseg.ADE20KDataset', 'data_root': str(tmp_path), 'data_prefix': prefix}


@pytest.mark.parametrize('kind', ['classes', 'coco', 'ade'])
def test_check_accepts_a_whole_folder(kind, request):
    cfg = request.getfixturevalue(kind)
    check_dataset_cfg(cfg)
    check_dataset_cfg({'type': 'RepeatDataset', 'times': 2, 'dataset': cfg})
    check_dataset_cfg({'type': 'ConcatDataset', 'datasets': [cfg, cfg]})


@pytest.mark.parametrize('kind', ['classes', 'coco', 'ade'])
def test_check_names_missing_root_also_inside_wrappers(kind, request):
    cfg = {**request.getfixturevalue(kind), 'data_root': '/nowhere/at/all'}
    fails(cfg, 'data_root /nowhere/at/all is not a folder', 'docs/data.md')
    fails({'type': 'RepeatDataset', 'dataset': cfg}, '/nowhere/at/all')
    fails({'type': 'ConcatDataset', 'datasets': [cfg]}, '/nowhere/at/all')


@pytest.mark.parametrize('kind', ['classes', 'coco', 'ade'])
def test_check_names_folder_without_pictures(kind, request, tmp_path):
    cfg = request.getfixturevalue(kind)
    for path in [*tmp_path.rglob('*.jpg'), *tmp_path.rglob('*.JPEG')]:
        path.unlink()
    fails(cfg, 'has no files', '.jpg', 'train')


@pytest.mark.parametrize('kind', ['classes', 'coco', 'ade'])
def test_check_names_missing_folder_of_pictures(kind, request, tmp_path):
    cfg = request.getfixturevalue(kind)
    folder = {'classes': 'train', 'coco': 'train2017', 'ade': 'images'}[kind]
    (tmp_path / folder).rename(tmp_path / 'elsewhere')
    fails(cfg, f'The folder of pictures {tmp_path / folder}', 'does not exist')


def test_check_accepts_the_mini_sets():
    check_dataset_cfg(
        {'type': 'CustomDataset', 'data_root': str(MINI / 'imagenet'), 'data_prefix': 'val'}
    )
    check_dataset_cfg(
        {
            'type': 'CocoDataset',
            'data_root': str(MINI / 'coco'),
            'ann_file': 'annotations/instances_val2017.json',
            'data_prefix': {'img': 'val2017/'},
            'metainfo': {'classes': ('person', 'car')},
        }
    )
    prefix = {'img_path': 'images/validation', 'seg_map_path': 'annotations/validation'}
    check_dataset_cfg(
        {'type': 'ADE20KDataset', 'data_root': str(MINI / 'ade'), 'data_prefix': prefix}
    )


def test_check_needs_a_type():
    fails({'data_root': '/nowhere'}, '`type`', "['data_root']")


def test_check_takes_classes_as_types(coco):
    class CocoDataset:
        pass

    fails({**coco, 'type': CocoDataset, 'ann_file': 'none.json'}, 'none.json')


def test_check_leaves_remote_storage_alone(coco):
    check_dataset_cfg({**coco, 'data_root': 's3://bucket/coco/'})


def test_check_of_unknown_type_looks_at_its_root(tmp_path):
    check_dataset_cfg({'type': 'CityscapesDataset', 'data_root': str(tmp_path)})
    fails({'type': 'CityscapesDataset', 'data_root': '/nowhere'}, '/nowhere')


def test_imagenet_needs_a_thousand_class_folders(classes):
    cfg = {'type': 'ImageNet', 'data_root': classes['data_root'], 'split': 'train'}
    fails(cfg, 'has 2 class folders where 1000 are expected')
    check_dataset_cfg({**cfg, 'metainfo': {'classes': ['cat', 'dog']}})
    fails({**cfg, 'metainfo': {'classes': ['cat']}}, 'where 1 are expected')


def test_class_names_may_come_from_a_file(classes, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('cat\ndog\n')
    check_dataset_cfg({**classes, 'classes': str(names)})
    fails({**classes, 'classes': str(tmp_path / 'none.txt')}, 'none.txt')


def test_flat_folder_of_pictures_has_no_classes(classes, tmp_path):
    (tmp_path / 'flat').mkdir()
    (tmp_path / 'flat' / 'a.jpg').write_bytes(b'x')
    cfg = {**classes, 'data_prefix': 'flat'}
    fails(cfg, 'no class folders')
    check_dataset_cfg({**cfg, 'with_label': False})


def test_list_file_of_imagenet_is_checked(classes, tmp_path):
    cfg = {'type': 'ImageNet', 'data_root': classes['data_root'], 'split': 'train'}
    listed = tmp_path / 'meta' / 'train.txt'
    listed.parent.mkdir()
    listed.write_text('cat/a.JPEG 0\n')
    check_dataset_cfg(cfg)
    listed.write_text('cat/b.JPEG 0\n')
    fails(cfg, 'lists cat/b.JPEG, which is not in')
    listed.write_text('cat/a.JPEG\n')
    fails(cfg, "expected lines 'picture label', got 'cat/a.JPEG'")
    listed.write_text('')
    fails(cfg, 'is empty')


@pytest.mark.parametrize('limit', [2**26, 0], ids=['parsed', 'searched'])
@pytest.mark.parametrize(
    ('text', 'part'),
    [
        ('{"images": [', 'JSON'),
        ('', 'is empty'),
        ('[]', 'JSON'),
        ('{"images": [{}], "annotations": []}', "lacks ['categories']"),
        ('{}', "lacks ['images', 'annotations', 'categories']"),
    ],
)
def test_annotation_file_must_have_its_keys(coco, tmp_path, monkeypatch, text, part, limit):
    monkeypatch.setattr(checks, 'PARSE_LIMIT', limit)
    (tmp_path / 'instances.json').write_text(text)
    if text == '[]':
        fails(coco, 'instances.json')
    else:
        fails(coco, part, 'instances.json')


@pytest.mark.parametrize('key', ['images', 'categories'])
def test_annotation_file_must_not_be_without_content(coco, tmp_path, key):
    (tmp_path / 'instances.json').write_text(json.dumps({**CONTENT, key: []}))
    fails(coco, f'has no {key}')


def box(*absent: str) -> dict:
    whole = {'id': 1, 'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 4, 4], 'area': 16}
    whole |= {'iscrowd': 0, 'segmentation': [[0, 0, 4, 0, 4, 4]]}
    return {key: value for key, value in whole.items() if key not in absent}


@pytest.mark.parametrize('limit', [2**26, 0], ids=['parsed', 'searched'])
@pytest.mark.parametrize(
    ('key', 'entry', 'part'),
    [
        ('images', {'id': 1, 'file_name': 'a.jpg'}, "images[0] lacks ['height', 'width']"),
        ('annotations', box('bbox'), "annotations[0] lacks ['bbox']"),
        ('annotations', box('area', 'id'), "annotations[0] lacks ['area', 'id']"),
        ('annotations', 3, "annotations[0] lacks ['area', 'bbox', "),
    ],
)
def test_entries_of_an_annotation_file_must_have_their_keys(
    coco, tmp_path, monkeypatch, key, entry, part, limit
):
    monkeypatch.setattr(checks, 'PARSE_LIMIT', limit)
    (tmp_path / 'instances.json').write_text(json.dumps({**CONTENT, key: [entry]}))
    fails(coco, part, 'instances.json')
    (tmp_path / 'instances.json').write_text(json.dumps({**CONTENT, 'annotations': [box()]}))
    check_dataset_cfg(coco)


def test_every_entry_of_a_small_annotation_file_is_checked(coco, tmp_path):
    content = {**CONTENT, 'annotations': [box(), box('image_id')]}
    (tmp_path / 'instances.json').write_text(json.dumps(content))
    fails(coco, "annotations[1] lacks ['image_id']")


@pytest.mark.parametrize('limit', [2**26, 0], ids=['parsed', 'searched'])
def test_masks_are_needed_only_where_they_are_loaded(coco, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(checks, 'PARSE_LIMIT', limit)
    content = {**CONTENT, 'annotations': [box('segmentation')]}
    (tmp_path / 'instances.json').write_text(json.dumps(content))
    load = {'type': 'LoadAnnotations', 'with_bbox': True}
    check_dataset_cfg({**coco, 'pipeline': [load]})
    load['with_mask'] = True
    fails({**coco, 'pipeline': [load]}, "lacks ['segmentation']")
    guard = {'type': 'linvis.LoadGuard', 'transforms': [load]}
    fails({**coco, 'pipeline': [guard]}, "lacks ['segmentation']")


def test_searched_file_must_hold_valid_lists(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, 'PARSE_LIMIT', 0)
    path = tmp_path / 'instances.json'
    path.write_text('{"images": {}, "annotations": [], "categories": []}')
    fails(coco, 'images is not a list')
    path.write_text('{"images": [{]}, "annotations": [], "categories": []}')
    fails(coco, 'the first of its images is not valid JSON')


def test_annotation_file_of_a_metric_is_checked(coco, tmp_path):
    path = tmp_path / 'instances.json'
    metric = {'type': 'mmdet.CocoMetric', 'ann_file': str(path)}
    check_evaluator_cfg(metric)
    check_evaluator_cfg([{'type': 'Accuracy'}, {**metric, 'ann_file': 's3://a.json'}])
    path.write_text(json.dumps({**CONTENT, 'annotations': [box('iscrowd')]}))
    with pytest.raises(DatasetError, match=r"annotations\[0\] lacks \['iscrowd'\]"):
        check_evaluator_cfg([metric])
    with pytest.raises(DatasetError, match=r'of the metric CocoMetric /nope\.json does not exist'):
        check_evaluator_cfg({**metric, 'ann_file': '/nope.json'})


@pytest.mark.parametrize('limit', [2**26, 0], ids=['parsed', 'searched'])
def test_classes_of_the_config_must_be_categories(coco, monkeypatch, limit):
    monkeypatch.setattr(checks, 'PARSE_LIMIT', limit)
    check_dataset_cfg({**coco, 'metainfo': {'classes': ('cat',)}})
    fails({**coco, 'metainfo': {'classes': ('cat', 'unicorn')}}, "['unicorn']", 'metainfo.classes')


def test_pictures_of_the_annotation_file_must_be_in_the_folder(coco, tmp_path):
    (tmp_path / 'train2017' / 'a.jpg').rename(tmp_path / 'train2017' / 'b.jpg')
    fails(coco, "lists 'a.jpg', which is not in")


def test_test_mode_needs_a_guard_that_skips_nothing(coco):
    guard = {'type': 'linvis.LoadGuard', 'transforms': [{'type': 'LoadImageFromFile'}]}
    cfg = {**coco, 'pipeline': [guard, {'type': 'Resize'}]}
    check_dataset_cfg(cfg)
    fails({**cfg, 'test_mode': True}, 'max_unreadable=0', 'got None')
    strict = {**guard, 'max_unreadable': 0}
    check_dataset_cfg({**coco, 'pipeline': [strict], 'test_mode': True})


def test_coco_needs_an_annotation_file(coco):
    fails({**coco, 'ann_file': ''}, 'no ann_file')
    fails({**coco, 'ann_file': 'none.json'}, 'none.json does not exist')


def test_pictures_without_label_maps_are_counted(ade, tmp_path):
    (tmp_path / 'annotations' / 'training' / 'b.png').unlink()
    fails(ade, '1 of 2 pictures', 'the first is b.png')


def test_empty_folder_of_label_maps_is_named(ade, tmp_path):
    for path in (tmp_path / 'annotations' / 'training').iterdir():
        path.unlink()
    fails(ade, 'The folder of label maps', 'has no files (.png)')


def test_list_of_a_segmentation_set_is_followed(ade, tmp_path):
    (tmp_path / 'split.txt').write_text('a\n')
    (tmp_path / 'annotations' / 'training' / 'b.png').unlink()
    check_dataset_cfg({**ade, 'ann_file': 'split.txt'})
    (tmp_path / 'split.txt').write_text('a\nc\n')
    fails({**ade, 'ann_file': 'split.txt'}, '1 of 2 pictures', 'c.png')
