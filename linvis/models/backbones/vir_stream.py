"""A causal ViR over pictures that come in bands of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linvis.models.layers.retention import StreamState

if TYPE_CHECKING:
    from linvis.models.backbones.vir import ViR


def stream_features(
    backbone: ViR, bands: Iterable[Tensor], height: int, *, cuda_graph: bool
) -> Iterator[tuple[Tensor, ...]]:
    """What `ViR.stream` yields, which has the description."""
    run = BandRun(backbone, height, GraphedLayers(backbone) if cuda_graph else Layers(backbone))
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


class Layers:
    """The layers of a causal ViR, band by band.

    Args:
        backbone: A causal ViR.
    """

    def __init__(self, backbone: ViR) -> None:
        self.backbone = backbone
        self._states = [StreamState() for _ in range(max(backbone.out_indices) + 1)]

    def __call__(self, tokens: Tensor, hw: tuple[int, int]) -> tuple[Tensor, ...]:
        """Outputs (B, T, C) of the output indices.

        Args:
            tokens: Tokens (B, T, C) of the next band.
            hw: Its grid, T = rows * columns, or one more with the class token.
        """
        by_index = []
        for index, state in enumerate(self._states):
            tokens = self.backbone.run_layer(index, tokens, hw, state)
            by_index.append(tokens)
        return tuple(by_index[index] for index in self.backbone.out_indices)


class GraphedLayers(Layers):
    """The same, launched as a CUDA graph from the third band of one size on.

    The first band has no states, and the second one loads what the graph is made of. Bands of
    another size than that of the graph, as the last one mostly is, are launched by the host.

    Args:
        backbone: A causal ViR.
    """

    def __init__(self, backbone: ViR) -> None:
        super().__init__(backbone)
        self._seen: tuple[Any, ...] | None = None
        self._captured: tuple[Any, ...] | None = None
        self._tokens: Tensor
        self._outputs: tuple[Tensor, ...]
        self._replay: Callable[[], None]

    def __call__(self, tokens: Tensor, hw: tuple[int, int]) -> tuple[Tensor, ...]:
        """As of `Layers`.

        Raises:
            ValueError: If the tokens are on no GPU.
        """
        check_gpu(tokens.device)
        band = (hw, tokens.shape, tokens.dtype, tokens.device, autocast_of())
        if self._captured is None and band == self._seen:
            self._capture(tokens, hw)
            self._captured = band
        if band == self._captured:
            self._tokens.copy_(tokens)
            self._replay()
            return tuple(output.clone() for output in self._outputs)
        self._seen = None if self._states[0].value is None else band
        return super().__call__(tokens, hw)

    def _capture(self, tokens: Tensor, hw: tuple[int, int]) -> None:
        for state in self._states:
            state.fix()
        with torch.inference_mode(False):  # what can be written in every mode
            self._tokens = tokens.clone()
        # what autocast has cast would be read where it lies now; what it casts belongs to the graph
        torch.clear_autocast_cache()
        self._outputs, self._replay = captured(
            lambda: super(GraphedLayers, self).__call__(self._tokens, hw), tokens.device
        )
        torch.clear_autocast_cache()


def captured(
    launch: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """A function's launches as a CUDA graph.

    Args:
        launch: Has run before, so that its kernels are there. Its launches are recorded, not run.
        device: The GPU that they are for.

    Returns:
        The tensors that it gives, and a function that runs the launches and fills them.
    """
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        # other threads, as of a data loader, may ask for memory meanwhile
        stream = _stream_of_captures(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
            outputs = launch()
    return outputs, graph.replay


@functools.cache
def _stream_of_captures(device: torch.device) -> torch.cuda.Stream:
    """The same for all graphs of a device: PyTorch keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


def autocast_of() -> torch.dtype | None:
    """The dtype that autocast gives products on a GPU, if it is on."""
    return torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None


def check_gpu(device: torch.device) -> None:
    """Raise ValueError unless graphs can be made on a device."""
    if device.type != 'cuda':
        raise ValueError(
            f'stream with cuda_graph=True needs bands on a CUDA GPU, got {device}; leave it out.'
        )


class BandRun:
    """One pass over the bands of pictures.

    Args:
        backbone: A causal ViR.
        height: Rows of pixels of the whole picture.
        layers: Its layers, which have seen no band yet.

    Attributes:
        pixels: Rows of pixels so far.
        patches: Patches so far, counted for out_type 'avg_featmap' alone.
        sums: Their sums (B, C) in float32, one for each output, likewise.
    """

    def __init__(self, backbone: ViR, height: int, layers: Layers) -> None:
        self.backbone = backbone
        self.height = height
        self.layers = layers
        self.pixels = 0
        self.patches = 0
        self.sums: list[Tensor] = []
        self._size: tuple[int, int] | None = None

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
        outputs = self.layers(tokens, hw)
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
