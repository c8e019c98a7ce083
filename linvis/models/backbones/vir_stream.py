"""A causal ViR over pictures that come in bands of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linvis.models.layers.retention import StreamState

if TYPE_CHECKING:
    from linvis.models.backbones.vir import ViR


def stream_features(
    backbone: ViR, bands: Iterable[Tensor], height: int
) -> Iterator[tuple[Tensor, ...]]:
    """What `ViR.stream` yields, which has the description."""
    run = BandRun(backbone, height)
    for band in bands:
        outputs, hw = run.feed(band)
        if backbone.out_type == 'raw':
            yield outputs
        elif backbone.out_type == 'featmap':
            yield tuple(backbone.to_featmap(x, hw) for x in outputs)
    if run.pixels != height:
        raise ValueError(f'The bands have {run.pixels} rows of pixels in all, not {height}.')
    if backbone.out_type == 'cls_token':
        yield tuple(x[:, -1] for x in outputs)
    elif backbone.out_type == 'avg_featmap':
        yield tuple((total / run.patches).to(x) for total, x in zip(run.sums, outputs, strict=True))


class BandRun:
    """One pass over the bands of pictures.

    Args:
        backbone: A causal ViR.
        height: Rows of pixels of the whole picture.

    Attributes:
        pixels: Rows of pixels so far.
        patches: Patches so far, counted for out_type 'avg_featmap' alone.
        sums: Their sums (B, C) in float32, one for each output, likewise.
    """

    def __init__(self, backbone: ViR, height: int) -> None:
        self.backbone = backbone
        self.height = height
        self.pixels = 0
        self.patches = 0
        self.sums: list[Tensor] = []
        self._size: tuple[int, int] | None = None
        self._states = [StreamState() for _ in backbone.layers]

    @torch.no_grad()
    def feed(self, band: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        """Outputs (B, T, C) of the next band, of the last one with the class token, and its grid.

        Raises:
            ValueError: If this is no band that may follow.
        """
        backbone = self.backbone
        backbone.check_band(band)
        first_row = self.pixels // backbone.patch_size
        self._count(band)
        grid_of = backbone.patch_embed.grid_of
        tokens = backbone.embed_band(band, first_row, grid_of(self.height, band.shape[-1]))
        hw = grid_of(*band.shape[-2:])
        if self.pixels == self.height:
            tokens = backbone.with_cls_token(tokens)
        by_index = {}
        for index in range(max(backbone.out_indices) + 1):
            tokens = backbone.run_layer(index, tokens, hw, self._states[index])
            by_index[index] = tokens
        outputs = tuple(by_index[index] for index in backbone.out_indices)
        if backbone.out_type == 'avg_featmap':
            patches = hw[0] * hw[1]
            self.patches += patches
            sums = [x[:, :patches].sum(1, dtype=torch.float32) for x in outputs]
            self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        return outputs, hw

    def _count(self, band: Tensor) -> None:
        """Add the rows of a band; raises ValueError unless it may follow."""
        batch, _, rows, width = band.shape
        if self._size not in (None, (batch, width)):
            raise ValueError(
                'All bands must have the batch size and width of the first one, '
                f'{self._size}, got {(batch, width)}.'
            )
        self._size = batch, width
        self.pixels += rows
        if self.pixels > self.height:
            raise ValueError(
                f'The bands have {self.pixels} rows of pixels or more, the picture {self.height}.'
            )
        if self.pixels < self.height and rows % self.backbone.patch_size:
            raise ValueError(
                'Bands but for the last must have a multiple of '
                f'{self.backbone.patch_size} rows of pixels, got {rows}.'
            )
