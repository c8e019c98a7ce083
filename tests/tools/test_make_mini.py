import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from linvis.datasets.verify import verify_dataset

SCRIPT = Path(__file__).parents[2] / 'tools' / 'dataset_converters' / 'make_mini.py'
LICENCES = {1: 'NC-SA', 4: 'Attribution License', 5: 'SA', 7: 'free'}
SIZE = (200, 100)  # width, height
SPLITS = {'train2017': (1, 2, 3), 'val2017': (4, 5)}
LICENCE_OF = {1: 4, 2: 5, 3: 1, 4: 7, 5: 1}


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('make_mini', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules['make_mini'] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules['make_mini']


def annotations_of(number):
    """An animal with a polygon, a crowd of persons as run lengths, a spoon of one pixel."""
    base = {'image_id': number, 'iscrowd': 0}
    box = [20, 10, 100, 80]
    # The upper half of the first 40 columns, column by column.
    counts = [0, *[50, 50] * 39, 50, 16050]
    return [
        {
            **base,
            'id': 10 * number,
            'category_id': 17,
            'bbox': box,
            'area': 8000,
            'segmentation': [[20, 10, 120, 10, 120, 90, 20, 90]],
        },
        {
            **base,
            'id': 10 * number + 1,
            'category_id': 1,
            'bbox': [0, 0, 40, 50],
            'area': 2000,
            'iscrowd': 1,
            'segmentation': {'counts': counts, 'size': [100, 200]},
        },
        {
            **base,
            'id': 10 * number + 2,
            'category_id': 50,
            'bbox': [5, 5, 1, 1],
            'area': 1,
            'segmentation': [[5, 5, 6, 5, 6, 6, 5, 6]],
        },
    ]


@pytest.fixture
def sources(tmp_path):
    rng = np.random.default_rng(0)
    categories = [
        {'id': 1, 'name': 'person', 'supercategory': 'person'},
        {'id': 17, 'name': 'cat', 'supercategory': 'animal'},
        {'id': 50, 'name': 'spoon', 'supercategory': 'kitchen'},
    ]
    licenses = [{'id': n, 'name': name, 'url': f'http://l/{n}'} for n, name in LICENCES.items()]
    coco, ade = tmp_path / 'coco', tmp_path / 'ade'
    rows = ['picture\tlicence\tsource page']
    for split, numbers in SPLITS.items():
        (coco / split).mkdir(parents=True)
        images = []
        for number in numbers:
            pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
            name = f'{number:012d}.jpg'
            Image.fromarray(pixels).save(coco / split / name)
            url = f'http://farm1.staticflickr.com/1/{number}_ab_z.jpg'
            images.append(
                {
                    'id': number,
                    'file_name': name,
                    'width': SIZE[0],
                    'height': SIZE[1],
                    'license': LICENCE_OF[number],
                    'flickr_url': url,
                }
            )
            stem = f'training/coco_{number:012d}'
            for folder, mode in (('images', 'RGB'), ('annotations', 'L')):
                suffix = {'images': '.jpg', 'annotations': '.png'}[folder]
                path = ade / folder / f'{stem}{suffix}'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).convert(mode).point(lambda v: v % 151).save(path)
            rows.append(f'{stem}\t{LICENCES[LICENCE_OF[number]]}\t{url}')
        content = {
            'licenses': licenses,
            'images': images,
            'annotations': [entry for number in numbers for entry in annotations_of(number)],
            'categories': categories,
        }
        path = coco / 'annotations' / f'instances_{split}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    (ade / 'credits.tsv').write_text('\n'.join(rows) + '\n')
    return coco, ade


def run(tool, sources, out, *more):
    arguments = ['--coco', str(sources[0]), '--ade', str(sources[1]), '--out', str(out), *more]
    return tool.main([*arguments, '--long-side', '100'])


def read_content(out, split='train2017'):
    return json.loads((out / 'coco' / 'annotations' / f'instances_{split}.json').read_text())


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_make_mini_writes_three_whole_sets(tool, sources, tmp_path, capsys):
    out = tmp_path / 'out'
    assert run(tool, sources, out) == 0
    assert 'photographs: 3\nrefused (NC-SA): 4\n' in capsys.readouterr().out
    for kind in ('imagenet', 'coco', 'ade'):
        found = list(verify_dataset(kind, out / kind, any_count=True, decode=True))
        assert found == []


def test_make_mini_is_deterministic(tool, sources, tmp_path):
    run(tool, sources, tmp_path / 'a')
    run(tool, sources, tmp_path / 'b')
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_make_mini_refuses_other_licences(tool, sources, tmp_path):
    run(tool, sources, tmp_path / 'out')
    numbers = {int(path.stem.split('_')[0]) for path in (tmp_path / 'out').rglob('*.jpg')}
    assert numbers == {1, 2, 4}
    assert {image['id'] for image in read_content(tmp_path / 'out')['images']} == {1, 2}


def test_make_mini_credits_every_file(tool, sources, tmp_path):
    out = tmp_path / 'out'
    run(tool, sources, out)
    with (out / 'CREDITS.tsv').open(newline='') as file:
        rows = list(csv.DictReader(file, delimiter='\t'))
    assert [row['licence'] for row in rows] == [tool.ALLOWED_LICENCES[n] for n in (4, 5, 7)]
    assert rows[0]['source_page'] == 'https://www.flickr.com/photo.gne?id=1'
    assert rows[0]['files'].split(' ') == [
        'ade/images/training/000000000001.jpg',
        'coco/train2017/000000000001.jpg',
        'imagenet/train/animal/000000000001_10.jpg',
    ]
    assert rows[0]['changes'] == 'resized to 100 x 50; cropped to objects and resized'


def test_make_mini_scales_boxes_polygons_and_crowds(tool, sources, tmp_path):
    run(tool, sources, tmp_path / 'out')
    content = read_content(tmp_path / 'out')
    animal, crowd = content['annotations'][:2]
    assert (content['images'][0]['width'], content['images'][0]['height']) == (100, 50)
    assert animal['bbox'] == [10, 5, 50, 40]
    assert animal['area'] == 2000
    assert animal['segmentation'] == [[10, 5, 60, 5, 60, 45, 10, 45]]
    assert crowd['area'] == 500
    mask = tool.decode_rle(crowd['segmentation'])
    assert mask.shape == (50, 100)
    assert mask[:25, :20].all()
    assert mask.sum() == 500


def test_make_mini_drops_objects_that_vanish(tool, sources, tmp_path):
    run(tool, sources, tmp_path / 'out')
    categories = {entry['category_id'] for entry in read_content(tmp_path / 'out')['annotations']}
    assert categories == {1, 17}


def test_make_mini_keeps_a_photograph_on_the_side_it_has_in_coco(tool, sources, tmp_path):
    run(tool, sources, tmp_path / 'out')
    labels = tmp_path / 'out' / 'ade' / 'annotations'
    assert [path.name for path in (labels / 'validation').iterdir()] == ['000000000004.png']
    with Image.open(labels / 'validation' / '000000000004.png') as picture:
        assert picture.size == (100, 50)


def test_make_mini_refuses_to_overwrite(tool, sources, tmp_path, capsys):
    assert run(tool, sources, tmp_path / 'out') == 0
    assert run(tool, sources, tmp_path / 'out') == 1
    assert 'exists already' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('damage', 'part'),
    [
        (lambda coco, ade: (ade / 'credits.tsv').unlink(), 'credits.tsv'),
        (lambda coco, ade: (coco / 'annotations' / 'instances_val2017.json').unlink(), 'val2017'),
        (
            lambda coco, ade: (coco / 'annotations' / 'instances_train2017.json').write_text('{}'),
            'lacks the keys',
        ),
        (lambda coco, ade: edit_first_image(coco, 'license'), "lacks 'license'"),
        (lambda coco, ade: edit_first_image(coco, 'flickr_url'), "'flickr_url'"),
    ],
)
def test_make_mini_names_what_its_sources_lack(tool, sources, tmp_path, capsys, damage, part):
    damage(*sources)
    assert run(tool, sources, tmp_path / 'out') == 1
    error = capsys.readouterr().err
    assert part in error
    assert error.count('\n') == 1


def edit_first_image(coco, key):
    path = coco / 'annotations' / 'instances_train2017.json'
    content = json.loads(path.read_text())
    del content['images'][0][key]
    path.write_text(json.dumps(content))


def test_run_length_code_survives_a_round_trip(tool):
    for seed in range(5):
        mask = np.random.default_rng(seed).integers(0, 2, (7, 5), dtype=np.uint8)
        assert tool.decode_rle(tool.encode_rle(mask)).tolist() == mask.tolist()
        compressed = mask_utils.encode(np.asfortranarray(mask))
        assert tool.decode_rle(compressed).tolist() == mask.tolist()
    for value in (0, 1):
        mask = np.full((4, 3), value, np.uint8)
        assert tool.decode_rle(tool.encode_rle(mask)).tolist() == mask.tolist()


@pytest.mark.parametrize(
    ('box', 'window'),
    [
        ((80, 40, 20, 20), (78, 38, 102, 62)),
        ((0, 0, 20, 10), (0, 0, 24, 24)),
        ((0, 0, 200, 100), (0, 0, 200, 100)),
        ((50, 0, 100, 20), (40, 0, 160, 100)),
    ],
)
def test_crop_window_is_square_where_the_picture_allows(tool, box, window):
    assert tool.crop_window(box, SIZE, margin=0.1) == window


def test_crops_of_one_picture_stay_apart(tool):
    def crop(label, left, size=10.0):
        return tool.Crop(label, left, 1, (left, 0, left + 20, 20), size)

    candidates = {'animal': [crop('animal', 0), crop('animal', 2)], 'food': [crop('food', 1)]}
    chosen = tool.select_crops(candidates, limit=5)
    assert [(entry.label, entry.annotation) for entry in chosen] == [('food', 1)]
