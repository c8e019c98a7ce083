from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linvis.models.backbones.arch import check_backend, drop_path_rates, settings_of
from linvis.models.backbones.backbone import OUT_TYPES
from linvis.models.backbones.token_backbone import TokenBackbone
from linvis.models.backbones.vir_stream import stream_features
from linvis.models.layers.featmap import to_featmap
from linvis.models.layers.layer_scale import LayerScale
from linvis.models.layers.mlp import mlp
from linvis.models.layers.norm import LayerNorm
from linvis.models.layers.patch_embed import PatchEmbed
from linvis.models.layers.position import resize_position_embedding_rows
from linvis.models.layers.pre_norm_block import PreNormBlock
from linvis.models.layers.retention import Retention
from linvis.registry import MODELS

INITIAL_STD = 0.02
EPS = 1e-6
REQUIRED_SETTINGS = ('embed_dims', 'depth', 'num_heads')


@MODELS.register_module()
class ViR(TokenBackbone):
    """ViR, a plain backbone whose token mixer is retention.

    | arch  | embed_dims | depth | num_heads |
    |-------|------------|-------|-----------|
    | small | 384        | 12    | 6         |
    | base  | 768        | 12    | 12        |
    | large | 1024       | 24    | 16        |

    A class token follows the patches, so that in the causal direction it sees all of them and they
    do not see it. With the decay over rows and columns it stands below the last row, in the last
    column. The position embedding is for the patches alone.

    To the contract of `TokenBackbone` it adds:

    * `out_type='cls_token'` (B, C): the class token, for classification; 'raw' has it at the end,
      as (B, T + 1, C), while 'featmap' and 'avg_featmap' are of the patches alone.
    * `stream` takes a picture in bands of rows, in memory that does not grow with its height.

    State dicts have the names of the authors' code. What differs from it: all forms are equal,
    where theirs applies a softmax in the one that is trained and in no other; any size of pictures.

    Args:
        arch: Name from the table, or a dict with 'embed_dims', 'depth' and 'num_heads'.
        retention: Decay '1d' along the sequence, or '2d' over rows and columns.
        direction: 'causal': a token sees those before it ('2d': to the left and above), or
            'bidirectional'.
        head_norm: Normalise each head behind the operator, as RetNet does; the authors do not.
        img_size: Picture size, in pixels, that the position embedding is learnt for; others are
            resampled.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the pictures.
        out_indices: Index or indices of the layers to return; negative ones count from the end.
        out_type: 'featmap' (B, C, Hp, Wp), 'raw' (B, T + 1, C), 'avg_featmap' (B, C) or 'cls_token'
            (B, C).
        layer_scale_init: Initial value of the layer scale.
        drop_path_rate: Drop path of the last layer; it grows linearly from 0 at the first one.
        frozen_stages: Freeze the embeddings and this many layers; -1 freezes nothing.
        with_cp: Recompute the activations of each layer in the backward pass instead of keeping
            them.
        backend: Backend of the operator, see `linvis_ops.available_backends`.
        init_cfg: Initialisation of mmengine, usually of type 'Pretrained'.

    Raises:
        ValueError: If arch is unknown or incomplete, if there is no such decay, direction or
            backend, or as for `TokenBackbone`.

    Source:
        ViR: Towards Efficient Vision Retention Backbones, arXiv:2310.19731.
    """

    layers_name = 'blocks'
    final_norm_name = 'norm'
    out_types: ClassVar[tuple[str, ...]] = (*OUT_TYPES, 'cls_token')

    archs: Mapping[str, Mapping[str, Any]] = {
        'small': {'embed_dims': 384, 'depth': 12, 'num_heads': 6},
        'base': {'embed_dims': 768, 'depth': 12, 'num_heads': 12},
        'large': {'embed_dims': 1024, 'depth': 24, 'num_heads': 16},
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'small',
        *,
        retention: str = '1d',
        direction: str = 'causal',
        head_norm: bool = False,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'featmap',
        layer_scale_init: float = 1e-5,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str = 'auto',
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        check_backend(backend, ('retention',))
        settings = settings_of(arch, self.archs, REQUIRED_SETTINGS, {})
        embed_dims, depth = settings['embed_dims'], settings['depth']
        blocks = [
            PreNormBlock(
                drop,
                norm1=LayerNorm(embed_dims, EPS, cast_output=True),
                retention=Retention(
                    embed_dims,
                    settings['num_heads'],
                    decay=retention,
                    direction=direction,
                    head_norm=head_norm,
                    backend=backend,
                ),
                ls1=LayerScale(embed_dims, layer_scale_init),
                norm2=LayerNorm(embed_dims, EPS, cast_output=True),
                mlp=mlp(embed_dims),
                ls2=LayerScale(embed_dims, layer_scale_init),
            )
            for drop in drop_path_rates(drop_path_rate, depth)
        ]
        super().__init__(
            patch_embed=PatchEmbed(in_channels, embed_dims, patch_size, name='proj'),
            layers=blocks,
            final_norm=LayerNorm(embed_dims, EPS),
            img_size=img_size,
            embed_dims=embed_dims,
            out_indices=out_indices,
            out_type=out_type,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.direction = direction
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.cls_token.requires_grad_(frozen_stages < 0)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=INITIAL_STD)
        nn.init.trunc_normal_(self.cls_token, std=INITIAL_STD)

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]  # under the authors' name
        """The layers, each called with (tokens, hw)."""
        return self.blocks

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, the class token last: (B, Hp * Wp + 1, C); and (Hp, Wp).

        Raises:
            ValueError: As `TokenBackbone.embed`.
        """
        tokens, hw = super().embed(images)
        return self.with_cls_token(tokens), hw

    def check_band(self, band: Tensor) -> None:
        """Raise ValueError unless these are parts of pictures (B, in_channels, h, W)."""
        self._check_images(band)

    def embed_band(self, band: Tensor, first_row: int, whole_hw: tuple[int, int]) -> Tensor:
        """Tokens (B, rows * Wp, C) of some rows of a picture, with their positions.

        Args:
            band: Shape (B, in_channels, h, W).
            first_row: Row of tokens of the whole picture that the band begins with.
            whole_hw: Grid of the whole picture.
        """
        tokens, hw = self.patch_embed(band)
        rows = range(first_row, first_row + hw[0])
        positions = resize_position_embedding_rows(self.pos_embed, self.pos_grid, whole_hw, rows)
        return tokens + positions

    def with_cls_token(self, tokens: Tensor) -> Tensor:
        """Tokens with the class token behind them, (B, T + 1, C)."""
        cls_token = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat((tokens, cls_token), dim=1)

    def _format(self, tokens: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.out_type == 'cls_token':
            return tokens[:, -1]
        if self.out_type == 'featmap':
            return self.to_featmap(tokens, hw)
        return super()._format(tokens[:, :-1] if self.out_type == 'avg_featmap' else tokens, hw)

    @staticmethod
    def to_featmap(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
        """View the patches among tokens (B, T, C) or (B, T + 1, C) as a map (B, C, Hp, Wp)."""
        return to_featmap(tokens[:, : hw[0] * hw[1]], hw)

    def _depth_of(self, name: str) -> int:
        return 0 if name == 'cls_token' else super()._depth_of(name)

    def stream(
        self, bands: Iterable[Tensor], height: int, *, cuda_graph: bool = False
    ) -> Iterator[tuple[Tensor, ...]]:
        """Features of a picture that comes in bands of rows, in the memory that one band takes.

        What the rows so far leave to those that follow are states of the operator, of the size of
        one row of tokens. The features are those of `forward` for the whole picture. For
        inference: gradients are not computed.

        Args:
            bands: Parts of the pictures from top to bottom, each (B, in_channels, h, W) with h a
                multiple of the patch size, but for the last one.
            height: Rows of pixels of the whole picture.
            cuda_graph: Launch the layers as a CUDA graph from the third band of one size on. A band
                has hundreds of launches, for which a GPU waits longer than it computes; the graph
                has memory of its own. It is made of the weights and settings that the backbone has
                then: leave these alone until the last band.

        Yields:
            One tensor for each output index: with out_type 'featmap' and 'raw' for each band (the
            class token of 'raw' comes with the last one), with 'avg_featmap' and 'cls_token' once,
            after the last band.

        Raises:
            ValueError: If the direction is not 'causal', the bands are not such parts of a picture,
                or a graph is wanted for bands on a CPU.
        """
        if self.direction != 'causal':
            raise ValueError(
                "stream needs direction='causal'; the rows of a bidirectional backbone depend on "
                'those below them.'
            )
        if not isinstance(height, int) or height < 1:
            raise ValueError(f'height must be a number of rows from 1 on, got {height!r}.')
        return stream_features(self, bands, height, cuda_graph=cuda_graph)
