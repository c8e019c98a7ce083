"""tools/stream.py: bands give what the whole picture gives."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from linvis import compat
from linvis.cli import main_stream
from linvis.engine import stream
from linvis.engine.errors import LaunchError

compat.install()

from mmseg.structures import SegDataSample  # noqa: E402

ROOT = Path(__file__).parents[2]
BACKBONE = """dict(
        type='linvis.ViR', arch=dict(embed_dims=16, depth=2, num_heads=2), img_size=32,
        patch_size=8, retention='2d', layer_scale_init=1.0, out_type='{out_type}',
    )"""
SEGMENTOR_CONFIG = ROOT / 'configs/quickstart/fcn_vir-micro-causal_1xb4-250i_mini-ade-256x256.py'
PREPROCESSOR = 'mean=[120.0, 110.0, 100.0], std=[60.0, 50.0, 40.0]'
CLASSIFIER = f"""
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict({PREPROCESSOR}, to_rgb=True),
    backbone={BACKBONE.format(out_type='cls_token')},
    head=dict(type='LinearClsHead', num_classes=7, in_channels=16),
)
"""
SEGMENTOR = f"""
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', {PREPROCESSOR}, bgr_to_rgb=True),
    backbone={BACKBONE.format(out_type='featmap')},
    decode_head=dict(
        type='FCNHead', in_channels=16, channels=16, num_convs=0, kernel_size=1,
        concat_input=False, num_classes=5, in_index=0,
    ),
    test_cfg=dict(mode='whole'),
)
"""
# A change of it: one convolution of one token.
ONE_CONV = ('num_convs=0, kernel_size=1', 'num_convs=1, kernel_size=1')


@pytest.fixture(autouse=True, scope='module')
def libraries():
    compat.install()


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def built(text):
    Path('config.py').write_text(text)
    cfg = Config.fromfile('config.py')
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    torch.save({'state_dict': model.state_dict()}, 'model.pth')
    return model


def picture_of(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def normalised(picture):
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    mean, std = torch.tensor([120.0, 110.0, 100.0]), torch.tensor([60.0, 50.0, 40.0])
    return (x - mean[:, None, None]) / std[:, None, None]


def whole_labels(model, picture):
    """As tools/test.py computes them."""
    sample = SegDataSample(
        metainfo={'img_shape': picture.shape[:2], 'ori_shape': picture.shape[:2]}
    )
    bgr = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)
    (result,) = model.test_step({'inputs': [bgr], 'data_samples': [sample]})
    return result.pred_sem_seg.data[0].numpy()


@pytest.mark.parametrize('band', [1, 2, 9])
def test_scores_of_bands_are_those_of_the_whole(band, capsys):
    model, picture = built(CLASSIFIER), picture_of(45, 30)
    scores = stream.classify(model, stream.bands_of(picture, 8 * band), 45)
    with torch.no_grad():
        expected = model.head(model.backbone(normalised(picture)))[0].softmax(-1)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    np.save('picture.npy', picture)
    command = ['config.py', 'model.pth', 'picture.npy', '--band', str(band), '--device', 'cpu']
    assert main_stream(command) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith('class'))
    assert int(first.split()[1]) == expected.argmax()
    assert float(first.split()[2]) == pytest.approx(expected.max().item(), abs=1e-4)


@pytest.mark.parametrize('height', [8, 40, 45, 50])
@pytest.mark.parametrize('band', [1, 2, 9])
def test_labels_of_bands_are_those_of_the_whole(band, height):
    model, picture = built(SEGMENTOR), picture_of(height, 30)
    parts = list(stream.segment(model, stream.bands_of(picture, 8 * band), height))
    labels = np.concatenate(parts)
    expected = whole_labels(model, picture)
    assert labels.shape == expected.shape == (height, 30)
    assert (labels == expected).mean() > 0.995  # a tie may fall either way


@pytest.mark.parametrize('name', ['picture.png', 'tall.npy'])
def test_config_of_a_segmentor_takes_pictures_in_bands(name, capsys):
    model = built(SEGMENTOR_CONFIG.read_text().replace("'./", f"'{SEGMENTOR_CONFIG.parent}/"))
    height, width = (45, 60) if name == 'picture.png' else (1203, 40)
    # squares, as noise looks the same everywhere
    picture = picture_of(80, 4).repeat(16, axis=0).repeat(16, axis=1)[:height, :width].copy()
    if name == 'tall.npy':
        np.save(name, picture)
    else:
        Image.fromarray(picture).save(name)
    command = [str(SEGMENTOR_CONFIG), 'model.pth', name, '--band', '3', '--device', 'cpu']
    assert main_stream([*command, '--out', 'labels.png']) == 0
    labels = np.asarray(Image.open('labels.png'))
    expected = whole_labels(model, picture)
    assert labels.shape == expected.shape == (height, width)
    shares = np.bincount(expected.ravel()) / expected.size
    assert (shares > 0.1).sum() >= 2
    assert (labels == expected).mean() > 0.995  # a tie may fall either way


def test_label_map_is_written(capsys):
    model, picture = built(SEGMENTOR), picture_of(45, 30)
    Image.fromarray(picture).save('picture.png')
    command = ['config.py', 'model.pth', 'picture.png', '--band', '2', '--device', 'cpu']
    assert main_stream([*command, '--out', 'labels.png']) == 0
    assert 'Label map: labels.png' in capsys.readouterr().out
    labels = np.asarray(Image.open('labels.png'))
    assert (labels == whole_labels(model, picture)).mean() > 0.995


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            ("retention='2d'", "retention='2d', direction='bidirectional'"),
            'got a bidirectional ViR',
        ),
        (('kernel_size=1', 'kernel_size=3'), None),  # of no convolution
        (ONE_CONV, None),
        (
            (ONE_CONV[0], f"{ONE_CONV[1]}, norm_cfg=dict(type='BN'), act_cfg=dict(type='GELU')"),
            None,
        ),
        (('num_convs=0, kernel_size=1', 'num_convs=1, kernel_size=3'), 'convs.0.conv is not known'),
        ((ONE_CONV[0], f"{ONE_CONV[1]}, norm_cfg=dict(type='GN', num_groups=4)"), 'convs.0.gn'),
        ((ONE_CONV[0], f"{ONE_CONV[1]}, norm_cfg=dict(type='IN')"), 'decode_head.convs.0.in'),
        (
            (ONE_CONV[0], f"{ONE_CONV[1]}, norm_cfg=dict(type='BN', track_running_stats=False)"),
            'track_running_stats=False',
        ),
        (('num_classes=5', 'num_classes=5, align_corners=True'), 'without align_corners'),
        (('num_classes=5', 'num_classes=300'), 'of 2 to 256 classes with a score each, got 300'),
        (('num_classes=5', 'num_classes=2, out_channels=1, threshold=0.5'), 'a score each, got 1'),
    ],
)
def test_models_that_need_the_whole_picture_are_refused(change, message):
    model = built(SEGMENTOR.replace(*change))
    if message is None:
        picture = picture_of(45, 30)
        labels = np.concatenate(list(stream.segment(model, stream.bands_of(picture, 16), 45)))
        assert (labels == whole_labels(model, picture)).mean() > 0.995
        return
    with pytest.raises(LaunchError, match=message):
        list(stream.segment(model, stream.bands_of(picture_of(16, 16), 8), 16))


def test_classifier_with_a_neck_is_refused():
    neck = "    neck=dict(type='GlobalAveragePooling'),\n    head="
    text = CLASSIFIER.replace("'cls_token'", "'featmap'").replace('    head=', neck)
    with pytest.raises(LaunchError, match="needs out_type='cls_token' or 'avg_featmap'"):
        stream.classify(built(text), stream.bands_of(picture_of(16, 16), 8), 16)


@pytest.mark.parametrize(
    ('text', 'change', 'told'),
    [
        (CLASSIFIER, 'pad_size_divisor=32', 'pad_size_divisor=32'),
        (SEGMENTOR, 'test_cfg=dict(size_divisor=32)', "test_cfg={'size_divisor': 32}"),
        (SEGMENTOR, 'test_cfg=dict(size=(64, 64))', "test_cfg={'size': (64, 64)}"),
        (SEGMENTOR, 'size=(64, 64), size_divisor=None', None),  # of training
    ],
)
def test_preprocessor_that_pads_is_refused(text, change, told):
    model = built(text.replace(PREPROCESSOR, f'{PREPROCESSOR}, {change}'))
    bands = stream.bands_of(picture_of(40, 16), 8)
    run = (
        (lambda: list(stream.segment(model, bands, 40)))
        if hasattr(model, 'decode_head')
        else (lambda: stream.classify(model, bands, 40))
    )
    if told is None:
        assert run()
        return
    with pytest.raises(LaunchError, match='is not padded, and the data preprocessor') as refusal:
        run()
    assert f'({told}): take model.data_preprocessor.' in str(refusal.value)


def test_label_map_that_cannot_be_saved_is_told(monkeypatch, capsys):
    built(SEGMENTOR)
    np.save('picture.npy', picture_of(16, 16))

    def full(*_args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    assert main_stream(['config.py', 'model.pth', 'picture.npy', '--device', 'cpu']) == 1
    error = capsys.readouterr().err
    assert 'cannot be written to picture_labels.png: [Errno 28] No space left' in error


@pytest.mark.parametrize('out', ['labels.PNG', None])
def test_classifier_does_not_ask_for_a_file_and_endings_may_be_upper_case(out):
    np.save('picture.npy', picture_of(16, 16))
    Path('picture_labels.png').mkdir()
    built(CLASSIFIER if out is None else SEGMENTOR)
    command = ['config.py', 'model.pth', 'picture.npy', '--device', 'cpu']
    assert main_stream(command if out is None else [*command, '--out', out]) == 0
    assert out is None or Image.open(out).size == (16, 16)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['model.pth', 'none.png'], 'There is no picture none.png'),
        (['model.pth', 'config.py'], 'config.py cannot be read as a picture'),
        (['model.pth', 'bad.npy'], 'hold bytes (H, W, 3), at least one pixel, got float64 (2, 2)'),
        (['model.pth', 'text.npy'], 'text.npy cannot be read as an array'),
        (['model.pth', 'deep.png'], 'deep.png has more than 8 bits a channel (I;16)'),
        (['model.pth', 'empty.npy'], 'empty.npy cannot be read as an array'),
        (['model.pth', 'zip.npy'], 'zip.npy cannot be read as an array'),
        (['model.pth', 'picture.npy', '--out', 'x/y.png'], 'no folder x; make it first'),
        (['model.pth', 'picture.npy', '--out', ''], '--out must name a file, got nothing'),
        (['model.pth', 'picture.npy', '--out', 'y.jpg'], '--out must be a .png file, not y.jpg'),
        (['model.pth', 'picture.npy', '--out', 'dir.png'], 'got the folder dir.png'),
        (['model.pth', 'picture.npy', '--out', '/proc/y.png'], '/proc/y.png cannot be written'),
        (['model.pth', 'deep.png', '--out', './deep.png'], 'is the picture deep.png itself'),
        (['model.pth', 'deep.png', '--out', 'link.png'], 'is the picture deep.png itself'),
        (['none.pth', 'picture.npy', '--out', 'y.png'], '--out is for label maps'),
        (['none.pth', 'picture.npy'], 'There is no checkpoint file none.pth'),
        (['model.pth', 'picture.npy', '--band', '0'], '--band must be at least 1, not 0'),
        (
            ['model.pth', 'picture.npy', '--cfg-options', 'model.head.num_classes=abc'],
            'LinearClsHead cannot be built (TypeError: ',
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(options, message, capsys):
    built(CLASSIFIER)
    np.save('picture.npy', picture_of(16, 16))
    np.save('bad.npy', np.zeros((2, 2)))
    Path('text.npy').write_text('text')
    Path('empty.npy').touch()
    np.savez('zip.npz', a=np.zeros(2))
    Path('zip.npz').rename('zip.npy')
    Path('dir.png').mkdir()
    Path('link.png').symlink_to('deep.png')
    Image.fromarray(np.zeros((4, 4), np.uint16)).save('deep.png')
    assert main_stream(['config.py', *options, '--device', 'cpu']) == 1
    error = capsys.readouterr().err
    assert message in error
    assert 'Traceback' not in error
    assert not Path('y.png').exists()


def test_classes_are_named_as_in_the_checkpoint(capsys):
    Path('config.py').write_text(CLASSIFIER)
    np.save('picture.npy', picture_of(40, 24))
    init_default_scope('mmpretrain')
    state_dict = MODELS.build(Config.fromfile('config.py').model).state_dict()
    classes = tuple('abcdefg')
    checkpoint = {'state_dict': state_dict, 'meta': {'dataset_meta': {'classes': classes}}}
    torch.save(checkpoint, 'checkpoint.pth')
    assert main_stream(['config.py', 'checkpoint.pth', 'picture.npy', '--device', 'cpu']) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if '  0.' in line]
    assert len(names) == stream.SHOWN
    assert set(names) <= set(classes)


def test_config_on_a_library_and_preprocessor_beside_the_model():
    base = ROOT / 'configs' / 'sanity' / '_base_' / 'upernet_ade20k-40-512x512.py'
    Path('on_mmseg.py').write_text(
        f"_base_ = '{base}'\n" + SEGMENTOR.replace('model = dict(', 'model = dict(_delete_=True,')
    )
    line = f'    data_preprocessor=dict({PREPROCESSOR}, to_rgb=True),\n'
    beside = CLASSIFIER.replace(line, '') + line.strip(' ,\n')
    Path('beside.py').write_text(beside)
    np.save('picture.npy', picture_of(40, 24))
    for config in ('on_mmseg.py', 'beside.py'):
        done = subprocess.run(
            [sys.executable, str(ROOT / 'tools/stream.py'), config, 'none', 'picture.npy',
             '--device', 'cpu'],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_picture_is_turned_as_its_camera_says():
    image = Image.fromarray(picture_of(20, 40))
    exif = image.getexif()
    exif[274] = 6
    image.save('turned.jpg', exif=exif)
    assert stream.open_picture(Path('turned.jpg')).shape == (40, 20, 3)
