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
from linvis.engine.files import out_file
from linvis.models import ViR
from linvis.utils.checkpoint import load_checkpoint, load_state_dict_into

# Classes that are printed for a picture.
SHOWN = 5
# Of a label map, one byte a pixel.
MOST_CLASSES = 256
# What a head may be made of: in evaluation mode the output for a token depends on that token alone.
# Convolutions and batch norms are looked at further; a subclass may do something else.
ONE_TOKEN_MODULES = frozenset(
    (
        *(nn.Sequential, nn.ModuleList, nn.Identity, nn.Dropout, nn.Dropout2d),
        *(nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
        *(nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus),
    )
)
# Of mmcv: a convolution with norm and activation, and activations.
ONE_TOKEN_MODULES_OF_MMCV = frozenset(
    ('ConvModule', 'Conv2d', 'Clamp', 'HSigmoid', 'HSwish', 'Swish')
)


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
    out = None if args.out is None else _label_file(args.out, args.picture)
    picture = open_picture(Path(args.picture))
    if 'data_preprocessor' in cfg:  # as mmengine's runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    segments = getattr(model, 'decode_head', None) is not None
    if segments and out is None:
        out = _label_file(f'{Path(args.picture).stem}_labels.png', args.picture)
    if out is not None and not segments:
        raise LaunchError('--out is for label maps, and this model is no segmentor.')
    names = None
    if args.checkpoint != 'none':
        checkpoint = load_checkpoint(args.checkpoint)
        load_state_dict_into(model, checkpoint)
        names = checkpoint.get('meta', {}).get('dataset_meta', {}).get('classes')
    model.to(placement.device).eval()
    step = args.band * _streamed_backbone(model).patch_size
    bands = _with_progress(bands_of(picture, step), -(-picture.shape[0] // step))
    if out is not None:
        labels = np.concatenate(list(segment(model, bands, picture.shape[0])))
        try:
            Image.fromarray(labels).save(out)
        except OSError as error:
            raise LaunchError(f'The label map cannot be written to {out}: {error}.') from None
        sys.stdout.write(f'\nLabel map: {out}\n')
        return
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
            pixels = np.lib.format.open_memmap(path, mode='r')
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
    if (
        getattr(model, 'neck', None) is not None
        or backbone.out_type != 'featmap'
        or type(head).__name__ != 'FCNHead'
        or head.align_corners
    ):
        raise LaunchError(
            "A segmentor that takes a picture in bands needs out_type='featmap', no neck, and an "
            f'FCNHead without align_corners; got {type(head).__name__}.'
        )
    _check_one_token(head)
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


def _check_one_token(head: nn.Module) -> None:
    """Raise LaunchError unless all that runs in a head looks at one token at a time."""
    for name, module in head.named_modules():
        if module is head or name.partition('.')[0] == 'loss_decode':  # which runs in training
            continue
        kind = type(module)
        of_mmcv = kind.__module__.partition('.')[0] == 'mmcv'
        known = kind in ONE_TOKEN_MODULES or (
            of_mmcv and kind.__name__ in ONE_TOKEN_MODULES_OF_MMCV
        )
        if isinstance(module, nn.Conv2d):
            known = known and module.kernel_size == (1, 1)
        elif isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            known = known and module.running_mean is not None  # else it takes that of the picture
        if not known:
            raise LaunchError(
                'A segmentor that takes a picture in bands needs a head that looks at one token at '
                f'a time, and decode_head.{name} is not known to, {module}: take kernel_size=1, '
                "and norm_cfg=dict(type='BN') or none."
            )


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
    """Bands as the model's data preprocessor gives them: (1, 3, h, W).

    Raises:
        LaunchError: If it pads, which would make another picture of each band.
    """
    name, default, padding = _padding_of(model.data_preprocessor)  # type: ignore[arg-type]
    if padding != default:
        raise LaunchError(
            f'A picture in bands is not padded, and the data preprocessor pads ({name}={padding}): '
            f'take model.data_preprocessor.{name}={default}.'
        )
    for band in bands:
        # in BGR, as pipelines load pictures; a copy, since it may be mapped read-only
        pixels = torch.from_numpy(band[..., ::-1].copy()).permute(2, 0, 1)
        yield model.data_preprocessor({'inputs': [pixels]})['inputs']  # type: ignore[operator]


def _padding_of(preprocessor: nn.Module) -> tuple[str, int | None, object]:
    """The argument by which a data preprocessor pads in tests, its value for none, its value."""
    if hasattr(preprocessor, 'test_cfg'):  # that of mmseg, where others are for training
        return 'test_cfg', None, preprocessor.test_cfg or None
    return 'pad_size_divisor', 1, getattr(preprocessor, 'pad_size_divisor', 1)


def _label_file(text: str, picture: str) -> Path:
    """The file of the label map.

    Raises:
        LaunchError: If it is no .png file, cannot be written, or is the picture itself.
    """
    out = out_file(text)
    if out.suffix.lower() != '.png':
        raise LaunchError(f'--out must be a .png file, not {text}.')
    if out.exists() and Path(picture).exists() and out.samefile(picture):
        raise LaunchError(f'--out {text} is the picture {picture} itself: name another file.')
    return out


def _with_progress(bands: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    progress = ProgressBar(count)
    for band in bands:
        yield band
        progress.update()
