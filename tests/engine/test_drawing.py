"""Drawings of predictions."""

from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.visualization import Visualizer
from PIL import Image

from linvis.engine.drawing import LONG_SIDE, ClassDrawingHook


@pytest.fixture
def drawn(monkeypatch):
    """What reaches the visualiser."""
    calls = []
    visualizer = SimpleNamespace(
        visualize_cls=lambda image, sample, **kwargs: calls.append((image, sample, kwargs))
    )
    monkeypatch.setattr(Visualizer, 'get_current_instance', lambda: visualizer)
    return calls


def test_class_drawing_keeps_the_colours_of_the_file_and_enlarges(drawn, tmp_path):
    picture = tmp_path / 'cat' / '1.png'
    picture.parent.mkdir()
    Image.new('RGB', (64, 32), (200, 20, 10)).save(picture)
    sample = SimpleNamespace(img_path=str(picture))
    ClassDrawingHook(str(tmp_path / 'out')).after_test_iter(None, 0, None, [sample])
    ((image, shown, kwargs),) = drawn
    assert shown is sample
    np.testing.assert_array_equal(image[0, 0], (200, 20, 10))
    assert kwargs['rescale_factor'] == LONG_SIDE / 64
    assert kwargs['out_file'] == str(tmp_path / 'out' / 'cat_1.png')
