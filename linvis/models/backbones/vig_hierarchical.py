from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from linvis.models.backbones.arch import check_backend, settings_of
from linvis.models.backbones.backbone import Backbone
from linvis.models.layers.featmap import to_featmap, to_tokens
from linvis.models.layers.gated_linear_attention import GatedLinearAttention
from linvis.models.layers.norm import LayerNorm2d
from linvis.models.layers.patch_embed import conv_stem
from linvis.models.layers.pre_norm_block import PreNormBlock
from linvis.models.layers.swiglu import SwiGLU
from linvis.registry import MODELS

STEM_STRIDE = 4
HIDDEN_MULTIPLE = 32
INITIAL_STD = 0.02
REQUIRED_SETTINGS = ('embed_dims', 'depths', 'num_heads')


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
            # under the authors' names, who have modules without parameters between
            steps['1'] = nn.Conv2d(embed_dims, 2 * embed_dims, 3, stride=2, padding=1)
            steps['3'] = LayerNorm2d(2 * embed_dims)
        self.downsample = nn.Sequential(steps)

    def shrink(self, tokens: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of the next stage: half the rows and columns, rounded up, twice the channels."""
        return _tokens_and_grid(self.downsample(to_featmap(tokens, hw)))


@MODELS.register_module()
class ViGHierarchical(Backbone):
    """ViG-H: four stages of bidirectional gated linear attention, of strides 4, 8, 16 and 32.

    | arch  | embed_dims | depths      | num_heads     |
    |-------|------------|-------------|---------------|
    | tiny  | 96         | 2, 2, 5, 2  | 3, 6, 12, 24  |
    | small | 96         | 2, 2, 17, 2 | 3, 6, 12, 24  |
    | base  | 128        | 2, 2, 17, 2 | 4, 8, 16, 32  |

    To the contract of `Backbone` it adds:

    * Pictures are not padded: each convolution of stride 2 rounds up, so the map of stride s is
      (ceil(H / s), ceil(W / s)).
    * `embed_dims` is the width of the first stage; each further stage doubles it.
    * Every output is normalised by a norm of its own, `outnorm` and the number of the stage.
    * There is no position embedding, and `with_cp` recomputes blocks one by one.

    State dicts have the names of the authors' checkpoints; their classifier's norm is the norm of
    the last stage here, see `linvis.utils.checkpoint`.

    Args:
        arch: Name from the table, or a dict with 'embed_dims' (of the first stage), 'depths' and
            'num_heads' (of each stage).
        in_channels: Channels of the pictures.
        out_indices: Index or indices of the stages to return; negative ones count from the end.
        out_type: 'featmap' (B, C, Hp, Wp), 'raw' (B, T, C) or 'avg_featmap' (B, C).
        drop_path_rate: Drop path of the last block; it grows linearly from 0 at the first one.
        frozen_stages: Freeze the stem and this many stages; -1 freezes nothing.
        with_cp: Recompute the activations of each block in the backward pass instead of keeping
            them.
        backend: Backend of the operator, see `linvis_ops.available_backends`.
        init_cfg: Initialisation of mmengine, usually of type 'Pretrained'.

    Raises:
        ValueError: If arch is unknown, incomplete or has not as many heads as depths, if there is
            no such backend, or as for `Backbone`.

    Source:
        ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention,
        arXiv:2405.18425.
    """

    archs: Mapping[str, Mapping[str, Any]] = {
        'tiny': {'embed_dims': 96, 'depths': (2, 2, 5, 2), 'num_heads': (3, 6, 12, 24)},
        'small': {'embed_dims': 96, 'depths': (2, 2, 17, 2), 'num_heads': (3, 6, 12, 24)},
        'base': {'embed_dims': 128, 'depths': (2, 2, 17, 2), 'num_heads': (4, 8, 16, 32)},
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        *,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'featmap',
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str = 'auto',
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        check_backend(backend, ('bi_gla',))
        settings = settings_of(arch, self.archs, REQUIRED_SETTINGS, {})
        depths, num_heads = tuple(settings['depths']), tuple(settings['num_heads'])
        if not depths or len(depths) != len(num_heads):
            raise ValueError(
                'An arch needs the depth and the heads of at least one stage, as many of both, got '
                f'depths {depths} and num_heads {num_heads}.'
            )
        embed_dims = settings['embed_dims']
        channels = [embed_dims * 2**stage for stage in range(len(depths))]
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
        # under the authors' names, who have modules without parameters between
        self.patch_embed = nn.Sequential(
            OrderedDict(zip(('0', '2', '4', '5', '7'), stem, strict=True))
        )
        drop_step = drop_path_rate / max(sum(depths) - 1, 1)
        self.layers = nn.ModuleList(
            Stage(
                [
                    PreNormBlock(
                        drop_step * index,
                        norm=nn.LayerNorm(dims),
                        op=GatedLinearAttention(
                            dims, heads, conv_act=False, out_act=False, backend=backend
                        ),
                        norm2=nn.LayerNorm(dims),
                        mlp=SwiGLU(dims, HIDDEN_MULTIPLE, ('fc1', 'fc2')),
                    )
                    for index in range(first, first + depth)
                ],
                dims,
                last=dims == channels[-1],
            )
            for dims, heads, depth, first in zip(
                channels, num_heads, depths, self._first_blocks, strict=False
            )
        )
        for index in sorted(self.out_indices):
            self.add_module(_norm_name(index), nn.LayerNorm(channels[index]))
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


def _norm_name(index: int) -> str:
    return f'outnorm{index}'


def _tokens_and_grid(featmap: Tensor) -> tuple[Tensor, tuple[int, int]]:
    rows, cols = featmap.shape[-2:]
    return to_tokens(featmap), (rows, cols)
