"""Class or label map of a very large picture, taken in bands of rows: what tools/stream.py does.

A causal ViR needs of the rows so far only states of fixed size: the memory of the network does not
grow with the height of the picture.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import ProgressBar
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from linvis import compat
from linvis.engine import config as configs
from linvis.engine.devices import resolve_placement
from linvis.engine.errors import LaunchError
from linvis.models import ViR
from linvis.utils.checkpoint import load_checkpoint, load_state_dict_into

# Classes that are printed for a picture.
SHOWN = 5
# Of a label map, one byte a pixel.
MOST_CLASSES = 256


def stream(args: argparse.Namespace) -> None:
    """Classify or segment a picture as the command line says.

    Args:
        args: Result of `linvis.cli.stream_parser()`.

    Raises:
        LaunchError: If config, checkpoint or picture cannot be used.
    """
    compat.install()  # before the config, which may inherit from the libraries
    cfg = configs.load_config(args.config, args.cfg_options)
    if 'model' not in cfg:
        raise LaunchError(f'Config {args.config} has no model.')
    placement = resolve_placement(args.device, 'none')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if args.band < 1:
        raise LaunchError(f'--band must be at least 1, not {args.band}.')
    out = Path(args.out or f'{Path(args.picture).stem}_labels.png')
    if out.suffix != '.png' or not out.parent.is_dir():
        raise LaunchError(f'--out must be a .png file in a folder that exists, not {out}.')
    picture = open_picture(Path(args.picture))
    if 'data_preprocessor' in cfg:  # as mmengine's runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    names = None
    if args.checkpoint != 'none':
        checkpoint = load_checkpoint(args.checkpoint)
        load_state_dict_into(model, checkpoint)
        names = checkpoint.get('meta', {}).get('dataset_meta', {}).get('classes')
    model.to(placement.device).eval()
    step = args.band * _streamed_backbone(model).patch_size
    bands = _with_progress(bands_of(picture, step), -(-picture.shape[0] // step))
    if getattr(model, 'decode_head', None) is not None:
        labels = np.concatenate(list(segment(model, bands, picture.shape[0])))
        Image.fromarray(labels).save(out)
        sys.stdout.write(f'\nLabel map: {out}\n')
        return
    if args.out:
        raise LaunchError('--out is for label maps, and this model is no segmentor.')
    scores = classify(model, bands, picture.shape[0])
    sys.stdout.write('\n')
    for place in scores.argsort(descending=True)[:SHOWN].tolist():
        name = names[place] if names else f'class {place:5}'
        sys.stdout.write(f'{name}  {scores[place].item():.4f}\n')


def open_picture(path: Path) -> np.ndarray:
    """Pixels (H, W, 3) in RGB, bytes.

    A .npy file of that shape is mapped and read band by band; other pictures are decoded as a
    whole into the memory of the host.

    Raises:
        LaunchError: If it is no such file.
    """
    if not path.is_file():
        raise LaunchError(f'There is no picture {path}; check the path.')
    if path.suffix == '.npy':
        try:
            pixels = np.load(path, mmap_mode='r')
        except (ValueError, OSError) as error:
            raise LaunchError(f'{path} cannot be read as an array: {error}.') from None
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise LaunchError(
                f'{path} must hold bytes (H, W, 3), at least one pixel, got {pixels.dtype} '
                f'{pixels.shape}.'
            )
        return pixels
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # large is what this is for
    try:
        with Image.open(path) as image:
            if image.mode.startswith(('I', 'F')):
                raise LaunchError(f'{path} has more than 8 bits a channel ({image.mode}).')
            return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    except (UnidentifiedImageError, OSError) as error:
        raise LaunchError(f'{path} cannot be read as a picture: {error}.') from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def bands_of(picture: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Parts of a picture (H, W, 3) from top to bottom, of so many rows; the last has the rest."""
    for start in range(0, picture.shape[0], rows):
        yield picture[start : start + rows]


def classify(model: nn.Module, bands: Iterable[np.ndarray], height: int) -> Tensor:
    """Scores (softmax) of the classes of a picture in bands, shape (classes,).

    Args:
        model: Classifier with a causal ViR, in evaluation mode.
        bands: Parts (h, W, 3) of the picture in RGB.
        height: Rows of the whole picture.

    Raises:
        LaunchError: If the model cannot take a picture in bands.
    """
    backbone = _streamed_backbone(model)
    if getattr(model, 'neck', None) is not None or backbone.out_type not in (
        'cls_token',
        'avg_featmap',
    ):
        raise LaunchError(
            "A classifier that takes a picture in bands needs out_type='cls_token' or "
            f"'avg_featmap' and no neck, got {backbone.out_type!r}."
        )
    if type(model.head).__name__ != 'LinearClsHead':
        raise LaunchError(
            'A classifier that takes a picture in bands needs a LinearClsHead, got '
            f'{type(model.head).__name__}.'
        )
    (features,) = _features(backbone, _normalised(model, bands), height)
    with torch.no_grad():
        return model.head(features)[0].float().softmax(-1)  # type: ignore[operator]


def segment(model: nn.Module, bands: Iterable[np.ndarray], height: int) -> Iterator[np.ndarray]:
    """Label map of a picture in bands, some rows (h, W) of bytes at a time.

    Scores are resampled (bilinear) to the pixels of the picture as mmseg does it for the whole;
    rows that need tokens of the next band come with that.

    Args:
        model: Segmentor with a causal ViR and a head that looks at one token at a time, in
            evaluation mode.
        bands: Parts (h, W, 3) of the picture in RGB.
        height: Rows of the whole picture.

    Raises:
        LaunchError: If the model cannot take a picture in bands.
    """
    backbone = _streamed_backbone(model)
    head: nn.Module = model.decode_head  # type: ignore[assignment]
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    if (
        getattr(model, 'neck', None) is not None
        or backbone.out_type != 'featmap'
        or type(head).__name__ != 'FCNHead'
        or any(m.kernel_size != (1, 1) for m in convolutions)
        or head.align_corners
    ):
        raise LaunchError(
            "A segmentor that takes a picture in bands needs out_type='featmap', no neck, and an "
            'FCNHead whose convolutions see one token (kernel_size=1), without align_corners; got '
            f'{type(head).__name__}.'
        )
    if not 1 < head.out_channels <= MOST_CLASSES:  # type: ignore[operator]
        raise LaunchError(
            f'Label maps are of 2 to {MOST_CLASSES} classes with a score each, got '
            f'{head.out_channels}.'
        )
    rows = backbone.patch_embed.grid_of(height, 1)[0]
    at_hand: Tensor | None = None  # scores of the rows of tokens first..last
    first = done = 0
    for maps, (pixels, width) in _together(backbone, _normalised(model, bands), height):
        with torch.no_grad():
            scores = head(maps)  # (1, classes, rows, columns)
            at_hand = scores if at_hand is None else torch.cat((at_hand[:, :, -1:], scores), 2)
            last = first + at_hand.shape[2] - 1
            # a row of pixels p lies at (p + 1/2) rows / height - 1/2, between two rows of tokens
            end = height if pixels == height else -((rows - (2 * last + 1) * height) // (2 * rows))
            at = (torch.arange(done, end, dtype=torch.float64) + 0.5) * (rows / height) - 0.5
            at = at.clamp(min=first).to(at_hand.device)  # no less but for rounding, or at the top
            above = at.floor().long()
            below = (above + 1).clamp(max=last)
            share = (at - above).to(at_hand.dtype)[:, None]
            lines = torch.lerp(at_hand[:, :, above - first], at_hand[:, :, below - first], share)
            size = end - done, width
            lines = F.interpolate(lines, size, mode='bilinear', align_corners=False)
        yield lines[0].argmax(0).byte().cpu().numpy()
        first, done = last, end


def _together(
    backbone: ViR, bands: Iterator[Tensor], height: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[int, int]]]:
    """Features of each band, with the rows of pixels so far and the width."""
    size = [0, 0]

    def counted() -> Iterator[Tensor]:
        for band in bands:
            size[0] += band.shape[-2]
            size[1] = band.shape[-1]
            yield band

    for maps in _features(backbone, counted(), height):
        yield maps, (size[0], size[1])


def _features(backbone: ViR, bands: Iterator[Tensor], height: int) -> Iterator[tuple[Tensor, ...]]:
    """Features of bands, on a GPU by a CUDA graph."""
    return backbone.stream(bands, height, cuda_graph=backbone.cls_token.is_cuda)


def _streamed_backbone(model: nn.Module) -> ViR:
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, ViR) or backbone.direction != 'causal':
        kind = f'a {backbone.direction} ' if isinstance(backbone, ViR) else ''
        raise LaunchError(
            "Only a model with a causal ViR takes a picture in bands (direction='causal'), got "
            f'{kind}{type(backbone).__name__}; see docs/models/vir.md.'
        )
    return backbone


def _normalised(model: nn.Module, bands: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """Bands as the model's data preprocessor gives them: (1, 3, h, W)."""
    for band in bands:
        # in BGR, as pipelines load pictures; a copy, since it may be mapped read-only
        pixels = torch.from_numpy(band[..., ::-1].copy()).permute(2, 0, 1)
        yield model.data_preprocessor({'inputs': [pixels]})['inputs']  # type: ignore[operator]


def _with_progress(bands: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    progress = ProgressBar(count)
    for band in bands:
        yield band
        progress.update()
