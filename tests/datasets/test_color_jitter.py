import itertools
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from linvis.datasets import ColorJitter
from linvis.registry import TRANSFORMS

STEPS = {
    'brightness': functional.adjust_brightness,
    'contrast': functional.adjust_contrast,
    'saturation': functional.adjust_saturation,
}


@pytest.fixture
def picture():
    # (H, W, 3); far enough from 0 and 255 that no step clips
    rng = np.random.default_rng(0)
    return rng.integers(90, 150, (37, 53, 3), dtype=np.uint8)


@pytest.fixture
def jitter():
    random.seed(0)
    return TRANSFORMS.build(
        {'type': 'linvis.ColorJitter', 'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4}
    )


@pytest.mark.parametrize('order', itertools.permutations(STEPS), ids='-'.join)
@pytest.mark.parametrize('factors', [(0.6, 1.4, 0.7), (1.4, 0.6, 1.3)])
def test_jitter_equals_the_steps_of_torchvision(jitter, picture, monkeypatch, order, factors):
    steps = [(name, dict(zip(STEPS, factors, strict=True))[name]) for name in order]
    monkeypatch.setattr(jitter, 'draw', lambda: steps)

    result = jitter({'img': picture.copy()})['img']

    # (3, H, W) in the order red, green, blue, as floating point numbers in 0..1
    expected = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1).double() / 255
    for name, factor in steps:
        expected = STEPS[name](expected, factor)
    expected = expected.permute(1, 2, 0).flip(2).numpy() * 255
    assert result.dtype == np.uint8
    # rounding of the result and, by OpenCV, of the coefficients
    np.testing.assert_allclose(result, expected, atol=0.8)


def test_jitter_saturates_and_leaves_no_wrapped_values(picture, monkeypatch):
    jitter = ColorJitter(brightness=0.4)
    monkeypatch.setattr(jitter, 'draw', lambda: [('brightness', 1.4)])
    white = np.full_like(picture, 250)
    np.testing.assert_array_equal(jitter({'img': white})['img'], 255)


def test_jitter_of_nothing_changes_nothing(picture):
    np.testing.assert_array_equal(ColorJitter()({'img': picture.copy()})['img'], picture)


def test_factors_cover_their_range_and_all_orders_occur(jitter):
    draws = [jitter.draw() for _ in range(2000)]
    assert len({tuple(name for name, _ in steps) for steps in draws}) == 6
    for name in STEPS:
        factors = np.array([dict(steps)[name] for steps in draws])
        assert 0.6 <= factors.min() < 0.62
        assert 1.38 < factors.max() <= 1.4
        assert abs(factors.mean() - 1) < 0.02


def test_factors_are_never_negative():
    jitter = ColorJitter(saturation=3.0)
    assert min(dict(jitter.draw())['saturation'] for _ in range(200)) >= 0


def test_same_seed_gives_the_same_picture(jitter, picture):
    results = []
    for _ in range(2):
        random.seed(3)
        results.append(jitter({'img': picture.copy()})['img'])
    np.testing.assert_array_equal(*results)
    assert not np.array_equal(jitter({'img': picture.copy()})['img'], results[0])


def test_negative_strength_is_refused():
    with pytest.raises(ValueError, match='contrast must be at least 0, got -1'):
        ColorJitter(contrast=-1)


@pytest.mark.parametrize('shape', [(4, 4), (4, 4, 1), (4, 4, 4)])
def test_picture_of_other_channels_is_refused(jitter, shape):
    with pytest.raises(ValueError, match='must be uint8 of shape'):
        jitter({'img': np.zeros(shape, np.uint8)})


def test_picture_of_floats_is_refused(jitter):
    with pytest.raises(ValueError, match='float32'):
        jitter({'img': np.zeros((4, 4, 3), np.float32)})
