from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from linvis.models.backbones.backbone import Backbone
from linvis.models.layers.featmap import to_featmap, to_tokens
from linvis.models.layers.norm import LayerNorm, LayerNorm2d
from linvis.models.layers.patch_embed import conv_stem

STEM_STRIDE = 4
INITIAL_STD = 0.02


class Stage(nn.Module):
    """Blocks at one resolution, and what leads to the next one.

    Args:
        blocks: Blocks, each called with (tokens, hw).
        embed_dims: Channels of the tokens.
        last: Whether there is no next stage.
    """

    def __init__(self, blocks: Sequence[nn.Module], embed_dims: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        steps = OrderedDict[str, nn.Module]()
        if not last:
            # under the names of ViG's authors, who have modules without parameters between
            steps['1'] = nn.Conv2d(embed_dims, 2 * embed_dims, 3, stride=2, padding=1)
            steps['3'] = LayerNorm2d(2 * embed_dims)
        self.downsample = nn.Sequential(steps)

    def shrink(self, tokens: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of the next stage: half the rows and columns, rounded up, twice the channels."""
        return _tokens_and_grid(self.downsample(to_featmap(tokens, hw)))


class HierarchicalBackbone(Backbone):
    """Contract and forward pass shared by backbones of stages of strides 4, 8, 16 and so on.

    A subclass builds the blocks and passes them on. To the contract of `Backbone` it adds:

    * Pictures are not padded: each convolution of stride 2 rounds up, so the map of stride s is
      (ceil(H / s), ceil(W / s)).
    * `embed_dims` is the width of the first stage; each further stage doubles it.
    * Every output is normalised by a norm of its own, `outnorm` and the number of the stage.
    * There is no position embedding, and `with_cp` recomputes blocks one by one.
    * Weights of linear layers are initialised here (normal, 0.02), biases by the blocks.

    Args:
        in_channels: Channels of the pictures.
        embed_dims: Channels of the first stage.
        stages: Blocks of each stage, each called with (tokens, hw).
        out_indices: Index or indices of the stages to return; negative ones count from the end.
        out_type: 'featmap' (B, C, Hp, Wp), 'raw' (B, T, C) or 'avg_featmap' (B, C).
        frozen_stages: Freeze the stem and this many stages; -1 freezes nothing.
        with_cp: Recompute the activations of each block in the backward pass instead of keeping
            them.
        init_cfg: Initialisation of mmengine, usually of type 'Pretrained'.

    Raises:
        ValueError: As for `Backbone`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        embed_dims: int,
        stages: Sequence[Sequence[nn.Module]],
        out_indices: int | Sequence[int],
        out_type: str,
        frozen_stages: int,
        with_cp: bool,
        init_cfg: dict[str, Any] | None,
    ) -> None:
        depths = tuple(len(blocks) for blocks in stages)
        channels = widths(embed_dims, depths)
        super().__init__(
            in_channels=in_channels,
            channels=channels,
            strides=[STEM_STRIDE * 2**stage for stage in range(len(depths))],
            num_depths=sum(depths) + 2,
            out_indices=out_indices,
            out_type=out_type,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.embed_dims = embed_dims
        self.depths = depths
        self._first_blocks = (0, *accumulate(depths))

        stem = conv_stem(in_channels, embed_dims, STEM_STRIDE, nn.GELU())
        # under the names of ViG's authors, who have modules without parameters between
        self.patch_embed = nn.Sequential(
            OrderedDict(zip(('0', '2', '4', '5', '7'), stem, strict=True))
        )
        self.layers = nn.ModuleList(
            Stage(blocks, dims, last=dims == channels[-1])
            for blocks, dims in zip(stages, channels, strict=True)
        )
        for index in sorted(self.out_indices):
            self.add_module(_norm_name(index), LayerNorm(channels[index]))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
        self._freeze()

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        norms = [_norm_name(index) for index in self.out_indices if index < self.frozen_stages]
        return [
            self.patch_embed,
            *self.layers[: self.frozen_stages],
            *(self.get_submodule(name) for name in norms),
        ]

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of the first stage, (B, Hp * Wp, embed_dims), and their grid (Hp, Wp).

        Raises:
            ValueError: If images is not a floating-point batch (B, in_channels, H, W) of at least
                one pixel.
        """
        self._check_images(images)
        return _tokens_and_grid(self.patch_embed(images))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of `out_indices` in the form of `out_type`.

        Args:
            images: Shape (B, in_channels, H, W).

        Returns:
            One tensor for each output index.
        """
        tokens, hw = self.embed(images)
        outputs: dict[int, Tensor] = {}
        last = max(self.out_indices)
        for index in range(last + 1):
            stage: Any = self.layers[index]
            for block in stage.blocks:
                tokens = self._run(block, tokens, hw)
            if index in self.out_indices:
                outputs[index] = self._format(self.get_submodule(_norm_name(index))(tokens), hw)
            if index < last:
                tokens, hw = stage.shrink(tokens, hw)
        return tuple(outputs[index] for index in self.out_indices)

    def _depth_of(self, name: str) -> int:
        if name.startswith('patch_embed.'):
            return 0
        if not name.startswith('layers.'):
            return self.num_depths - 1
        _, stage, part, block, *_ = name.split('.')
        if part == 'downsample':  # learns as the last block before it
            return self._first_blocks[int(stage) + 1]
        return self._first_blocks[int(stage)] + int(block) + 1


def widths(embed_dims: int, depths: Sequence[int]) -> tuple[int, ...]:
    """Channels of as many stages as there are depths, the first of which has embed_dims."""
    return tuple(embed_dims * 2**stage for stage in range(len(depths)))


def _norm_name(index: int) -> str:
    return f'outnorm{index}'


def _tokens_and_grid(featmap: Tensor) -> tuple[Tensor, tuple[int, int]]:
    rows, cols = featmap.shape[-2:]
    return to_tokens(featmap), (rows, cols)
