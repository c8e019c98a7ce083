import copy
import json
import logging
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader

import linvis.compat
from linvis.datasets import LoadGuard, UnreadableDataError
from linvis.registry import TRANSFORMS

LOAD = {'type': 'LoadImageFromFile'}


def make_guard(limit=50, transforms=(LOAD,)):
    return TRANSFORMS.build(
        {'type': 'linvis.LoadGuard', 'transforms': list(transforms), 'max_unreadable': limit}
    )


def make_dataset(tmp_path, names, guard, **options):
    listed = tmp_path / 'list.json'
    samples = [{'img_path': name} for name in names]
    listed.write_text(json.dumps({'metainfo': {}, 'data_list': samples}))
    prefix = {'img_path': str(tmp_path)}
    return BaseDataset(ann_file=str(listed), data_prefix=prefix, pipeline=[guard], **options)


@pytest.fixture
def messages(monkeypatch):
    """Return the lines given to mmengine's log."""
    lines = []

    def note(message, logger=None, level=logging.INFO):
        assert (logger, level) == ('current', logging.WARNING)
        lines.append(message)

    monkeypatch.setattr('linvis.datasets.load_guard.print_log', note)
    return lines


def test_guard_loads_good_pictures_as_three_channels(good_file, messages):
    image = make_guard()({'img_path': str(good_file)})['img']
    size = (48, 32, 3) if good_file.name == 'rotated.jpg' else (32, 48, 3)
    assert image.shape == size
    assert image.dtype == np.uint8
    assert not messages


def test_guard_skips_and_names_bad_pictures(bad_file, messages):
    path, reason = bad_file
    guard = make_guard()
    assert guard({'img_path': str(path)}) is None
    assert guard.num_unreadable == 1
    assert len(messages) == 1
    assert str(path) in messages[0]
    assert reason in messages[0]
    assert '\n' not in messages[0]


def test_guard_names_missing_file(tmp_path, messages):
    assert make_guard()({'img_path': str(tmp_path / 'absent.jpg')}) is None
    assert 'absent.jpg: the file does not exist' in messages[0]


def test_guard_names_folder_in_place_of_file(tmp_path, messages):
    assert make_guard()({'img_path': str(tmp_path)}) is None
    assert 'cannot be read' in messages[0]


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'BMP'])
@settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the file is written each time
)
@given(
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    kept=st.floats(0, 1),
)
def test_guard_loads_or_names_a_damaged_file(picture_bytes, tmp_path, kind, damage, kept):
    data = bytearray(picture_bytes(kind=kind))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path / 'damaged'
    path.write_bytes(data[: round(kept * len(data))])
    guard = make_guard()
    results = guard({'img_path': str(path)})
    if results is None:
        assert guard.num_unreadable == 1
    else:
        assert results['img'].ndim == 3
        assert results['img'].shape[2] == 3


def test_guard_counts_and_logs_a_file_once(tmp_path, messages):
    guard = make_guard(limit=1)
    for _ in range(5):
        assert guard({'img_path': str(tmp_path / 'absent.jpg')}) is None
    assert guard.num_unreadable == len(messages) == 1


def test_guard_stops_beyond_the_limit(tmp_path):
    guard = make_guard(limit=2)
    for name in 'ab':
        assert guard({'img_path': str(tmp_path / name)}) is None
    with pytest.raises(UnreadableDataError) as error:
        guard({'img_path': str(tmp_path / 'c')})
    text = str(error.value)
    assert '3 files cannot be read' in text
    assert 'max_unreadable=2' in text
    assert '/a, ' in text
    assert '/c (the file does not exist)' in text
    assert 'verify_data.py --decode' in text
    assert '\n' not in text


def test_guard_with_limit_zero_stops_at_the_first_file(bad_file):
    path, reason = bad_file
    with pytest.raises(UnreadableDataError, match=f'Cannot read {path}: .*{reason}.*score'):
        make_guard(limit=0)({'img_path': str(path)})


def test_guard_raises_errors_that_no_file_explains(good_file):
    class Broken(BaseTransform):
        def transform(self, results):
            raise KeyError('gt_bboxes')

    guard = make_guard(transforms=(LOAD, Broken()))
    with pytest.raises(KeyError, match='gt_bboxes'):
        guard({'img_path': str(good_file)})
    assert guard.num_unreadable == 0


def test_guard_refuses_pictures_without_three_channels(tmp_path, picture_bytes, messages):
    path = tmp_path / 'grey.png'
    path.write_bytes(picture_bytes('L', 'PNG'))
    guard = make_guard(transforms=({**LOAD, 'color_type': 'unchanged'},))
    assert guard({'img_path': str(path)}) is None
    assert 'expected three channels, it decodes to 32 x 48' in messages[0]


@pytest.mark.parametrize(
    ('transforms', 'limit', 'error'),
    [
        ([], 1, ValueError),
        ([LOAD], -1, ValueError),
        ([LOAD], 10**6, ValueError),
        ([LOAD], 1.5, TypeError),
        ([LOAD], True, TypeError),
    ],
)
def test_guard_refuses_wrong_arguments(transforms, limit, error):
    with pytest.raises(error, match=r'^LoadGuard: .*\.$'):
        LoadGuard(transforms, limit)


def test_guard_copies_share_the_count(tmp_path, messages):
    guard = make_guard()
    copied = copy.deepcopy(guard)
    copied({'img_path': str(tmp_path / 'a')})
    guard({'img_path': str(tmp_path / 'b')})
    assert guard.num_unreadable == copied.num_unreadable == 2
    assert copied.transforms is not guard.transforms


def test_guard_lets_a_training_dataset_draw_another_sample(tmp_path, picture_bytes, messages):
    (tmp_path / 'good.jpg').write_bytes(picture_bytes())
    dataset = make_dataset(tmp_path, ['bad.jpg', 'good.jpg'], make_guard())
    assert dataset[0]['img_path'].endswith('good.jpg')


def test_guard_stops_a_test_dataset_by_name(tmp_path):
    dataset = make_dataset(tmp_path, ['bad.jpg'], make_guard(limit=0), test_mode=True)
    with pytest.raises(UnreadableDataError, match=r'bad\.jpg'):
        dataset[0]


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_guard_count_is_shared_by_persistent_workers(tmp_path, picture_bytes, method):
    names = [f'{kind}{number}.jpg' for number in range(4) for kind in ('good', 'bad')]
    for name in names[::2]:
        (tmp_path / name).write_bytes(picture_bytes())
    guard = make_guard()
    loader = DataLoader(
        make_dataset(tmp_path, names, guard),
        num_workers=2,
        collate_fn=pseudo_collate,
        multiprocessing_context=method,
        persistent_workers=True,
    )
    for _ in range(2):
        paths = {path for batch in loader for path in batch['img_path']}
        assert all('good' in path for path in paths)
        assert guard.num_unreadable == 4


def test_guard_error_passes_from_a_worker_to_the_run(tmp_path):
    loader = DataLoader(
        make_dataset(tmp_path, ['a.jpg', 'b.jpg'], make_guard(limit=1)),
        num_workers=1,
        collate_fn=pseudo_collate,
        multiprocessing_context='fork',
    )
    with pytest.raises(UnreadableDataError, match='max_unreadable=1'):
        next(iter(loader))
    assert 'x' in str(pickle.loads(pickle.dumps(UnreadableDataError('x'))))


def write_ade_pair(tmp_path, picture_bytes, labels):
    (tmp_path / 'a.jpg').write_bytes(picture_bytes())
    (tmp_path / 'a.png').write_bytes(labels)
    return {
        'img_path': str(tmp_path / 'a.jpg'),
        'seg_map_path': str(tmp_path / 'a.png'),
        'reduce_zero_label': True,
        'label_map': None,
        'seg_fields': [],
    }


@pytest.fixture
def scope(request):
    """Make one of the task libraries the default scope, as a run does."""
    linvis.compat.install()
    with DefaultScope.overwrite_default_scope(request.param):
        yield request.param


segmentation = pytest.mark.parametrize('scope', ['mmseg'], indirect=True)


@segmentation
def test_guard_loads_label_maps_of_mmseg(scope, tmp_path, picture_bytes, label_bytes):
    guard = make_guard(transforms=(LOAD, {'type': 'LoadAnnotations'}))
    loaded = guard(write_ade_pair(tmp_path, picture_bytes, label_bytes()))
    assert loaded['gt_seg_map'].shape == (32, 48)
    assert type(guard.transforms.transforms[1]).__module__.startswith('mmseg.')


@segmentation
@pytest.mark.parametrize('backend', ['pillow', 'cv2'])
def test_guard_skips_truncated_label_maps(
    scope, tmp_path, picture_bytes, label_bytes, messages, backend
):
    guard = make_guard(transforms=(LOAD, {'type': 'LoadAnnotations', 'imdecode_backend': backend}))
    assert guard(write_ade_pair(tmp_path, picture_bytes, label_bytes()[:-30])) is None
    assert 'a.png: the PNG is truncated' in messages[0]


@segmentation
def test_guard_skips_label_maps_of_another_size(
    scope, tmp_path, picture_bytes, label_bytes, messages
):
    guard = make_guard(transforms=(LOAD, {'type': 'LoadAnnotations'}))
    assert guard(write_ade_pair(tmp_path, picture_bytes, label_bytes(size=(40, 32)))) is None
    assert 'a.png: the label map is (32, 40), its picture (32, 48)' in messages[0]


@segmentation
def test_guard_loads_label_maps_after_a_resize(scope, tmp_path, picture_bytes, label_bytes):
    sample = write_ade_pair(tmp_path, picture_bytes, label_bytes())
    resize = TRANSFORMS.build({'type': 'Resize', 'scale': (24, 16)})
    sample = resize(make_guard(0)(sample))
    loaded = make_guard(0, transforms=({'type': 'LoadAnnotations'},))(sample)
    assert loaded['img'].shape == (16, 24, 3)
    assert loaded['gt_seg_map'].shape == (32, 48)


@segmentation
def test_guard_skips_missing_label_maps(scope, tmp_path, picture_bytes, label_bytes, messages):
    guard = make_guard(transforms=(LOAD, {'type': 'LoadAnnotations'}))
    sample = write_ade_pair(tmp_path, picture_bytes, label_bytes())
    (tmp_path / 'a.png').unlink()
    assert guard(sample) is None
    assert 'a.png: the file does not exist' in messages[0]


@pytest.mark.parametrize('scope', ['mmdet'], indirect=True)
@pytest.mark.parametrize('prefix', ['', 'mmdet.'])
def test_guard_loads_boxes_of_mmdet(scope, tmp_path, picture_bytes, prefix):
    (tmp_path / 'a.jpg').write_bytes(picture_bytes())
    annotations = {'type': f'{prefix}LoadAnnotations', 'with_bbox': True}
    guard = make_guard(transforms=(LOAD, annotations))
    instance = {'bbox': [1, 2, 9, 9], 'bbox_label': 3, 'ignore_flag': 0}
    loaded = guard({'img_path': str(tmp_path / 'a.jpg'), 'instances': [instance]})
    assert loaded['gt_bboxes_labels'].tolist() == [3]


@pytest.mark.parametrize('scope', ['mmpretrain'], indirect=True)
def test_guard_loads_in_a_dataset_of_mmpretrain(scope, tmp_path, picture_bytes, messages):
    from mmpretrain.datasets import CustomDataset

    for name in ('cat/good.jpg', 'cat/bad.jpg', 'dog/good.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture_bytes() if 'good' in name else b'')
    guard = {'type': 'linvis.LoadGuard', 'transforms': [LOAD]}
    dataset = CustomDataset(data_root=str(tmp_path), data_prefix='', pipeline=[guard])
    assert {dataset[index]['img_path'][-8:] for index in range(3)} == {'good.jpg'}
    assert 'cat/bad.jpg: the file is empty' in messages[0]
