"""Random brightness, contrast and saturation in one pass over a picture."""

import random

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness

from linvis.registry import TRANSFORMS

# Weights of blue, green and red in grey (ITU-R BT.601).
_GREY = np.array([0.114, 0.587, 0.299])


@TRANSFORMS.register_module()
class ColorJitter(BaseTransform):
    """Change brightness, contrast and saturation by random factors, in random order.

    With a factor f, brightness blends the picture with black, contrast with the mean of its grey
    values, saturation with its own grey picture: f * picture + (1 - f) * other. Each factor is
    drawn uniformly from [max(0, 1 - x), 1 + x], where x is the argument.

    The steps are those of `mmpretrain.ColorJitter` and torchvision, at a tenth of the cost: each
    is an affine map of the three channels, and so are all together, which are applied at once.
    Values are rounded and clipped to 0..255 at the end only, not after each step.

    Needs 'img' of shape (H, W, 3), uint8, in the order blue, green, red; changes 'img'.

    Args:
        brightness: x of brightness, at least 0.
        contrast: x of contrast, at least 0.
        saturation: x of saturation, at least 0.

    Raises:
        ValueError: When an argument is negative, or a picture has another dtype or shape.
    """

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0
    ) -> None:
        self.strengths = {
            'brightness': brightness,
            'contrast': contrast,
            'saturation': saturation,
        }
        for name, strength in self.strengths.items():
            if strength < 0:
                raise ValueError(f'ColorJitter: {name} must be at least 0, got {strength}.')

    @cache_randomness
    def draw(self) -> list[tuple[str, float]]:
        """Return the steps with their factors, in the order in which they are applied."""
        steps = [
            (name, random.uniform(max(0.0, 1 - strength), 1 + strength))
            for name, strength in self.strengths.items()
        ]
        random.shuffle(steps)
        return steps

    def transform(self, results: dict) -> dict:
        """Change the colours of results['img']; the rest stays as it is."""
        picture = results['img']
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                'ColorJitter: img must be uint8 of shape (H, W, 3), got '
                f'{picture.dtype} of shape {picture.shape}.'
            )
        # After any of the steps the picture is a * picture + b * grey(picture) + c.
        mean = float(_GREY @ cv2.mean(picture)[:3])
        a, b, c = 1.0, 0.0, 0.0
        for name, factor in self.draw():
            if name == 'saturation':
                a, b = factor * a, b + (1 - factor) * a
            else:
                other = (a + b) * mean + c if name == 'contrast' else 0.0
                a, b, c = factor * a, factor * b, factor * c + (1 - factor) * other
        # (3, 4): three channels out of three and one
        affine = np.empty((3, 4))
        affine[:, :3] = b * _GREY
        affine[:, 3] = c
        affine.flat[::5] += a
        results['img'] = cv2.transform(picture, affine)
        return results

    def __repr__(self) -> str:
        strengths = ', '.join(f'{name}={value}' for name, value in self.strengths.items())
        return f'{type(self).__name__}({strengths})'
