from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linvis.models.backbones.arch import height_and_width
from linvis.models.backbones.backbone import Backbone
from linvis.models.layers.patch_embed import ConvPatchEmbed, PatchEmbed
from linvis.models.layers.position import (
    resize_position_embedding,
    resize_position_embedding_on_load,
)


class TokenBackbone(Backbone):
    """Contract and forward pass shared by plain backbones: patches, positions, layers, outputs.

    A subclass builds its parts, passes them on, and states under which names layers and final norm
    are kept in state dicts. To the contract of `Backbone` it adds:

    * Sizes that are no multiple of the patch size are padded with zeros at the bottom and at the
      right, so the grid is (ceil(H / patch), ceil(W / patch)).
    * The output of the last layer is normalised, others are not.
    * The position embedding is learnt for the grid of `img_size` and resampled (bicubic) for any
      other grid, at run time and when a state dict of another resolution is loaded.

    An adapter or any other composition may use the steps on their own: `embed`, `layers[i](tokens,
    hw)`, `to_featmap`.

    Args:
        patch_embed: Turns pictures into tokens and their grid.
        layers: Layers, each called with (tokens, hw).
        final_norm: Norm of the last output.
        img_size: Height and width, or both in one number, for which position embeddings are learnt.
        embed_dims: Channels C of a token.
        out_indices: Index or indices of the layers to return; negative ones count from the end.
        out_type: 'featmap' (B, C, Hp, Wp), 'raw' (B, T, C) or 'avg_featmap' (B, C).
        frozen_stages: Freeze the embeddings and the first `frozen_stages` layers; 0 is the
            embeddings alone, -1 nothing. With all layers the final norm is frozen too.
        with_cp: Recompute the activations of each layer in the backward pass instead of keeping
            them.
        init_cfg: Initialisation of mmengine, usually of type 'Pretrained'.

    Raises:
        ValueError: If out_indices, out_type, frozen_stages or img_size is not one of the above.
    """

    layers_name: ClassVar[str] = 'layers'
    final_norm_name: ClassVar[str]

    def __init__(
        self,
        *,
        patch_embed: PatchEmbed | ConvPatchEmbed,
        layers: Sequence[nn.Module],
        final_norm: nn.Module,
        img_size: int | Sequence[int],
        embed_dims: int,
        out_indices: int | Sequence[int],
        out_type: str,
        frozen_stages: int,
        with_cp: bool,
        init_cfg: dict[str, Any] | None,
    ) -> None:
        super().__init__(
            in_channels=patch_embed.in_channels,
            channels=[embed_dims] * len(layers),
            strides=[patch_embed.patch_size] * len(layers),
            num_depths=len(layers) + 2,
            out_indices=out_indices,
            out_type=out_type,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.embed_dims = embed_dims
        self.patch_size = patch_embed.patch_size
        self.pos_grid = patch_embed.grid_of(*height_and_width(img_size))
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.pos_grid[0] * self.pos_grid[1], embed_dims)
        )
        self.patch_embed = patch_embed
        self.add_module(self.layers_name, nn.ModuleList(layers))
        self.add_module(self.final_norm_name, final_norm)
        self.register_load_state_dict_pre_hook(resize_position_embedding_on_load)
        self._freeze()
        self.pos_embed.requires_grad_(frozen_stages < 0)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        frozen = [self.patch_embed, *self.layers[: self.frozen_stages]]
        if self.frozen_stages == self.num_layers:
            frozen.append(self.get_submodule(self.final_norm_name))
        return frozen

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions: (B, Hp * Wp, C), and the grid (Hp, Wp).

        Raises:
            ValueError: If images is not a floating-point batch (B, in_channels, H, W) of at least
                one pixel.
        """
        self._check_images(images)
        tokens, hw = self.patch_embed(images)
        return tokens + resize_position_embedding(self.pos_embed, self.pos_grid, hw), hw

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of `out_indices` in the form of `out_type`.

        Args:
            images: Shape (B, in_channels, H, W).

        Returns:
            One tensor for each output index.
        """
        tokens, hw = self.embed(images)
        outputs: dict[int, Tensor] = {}
        for index in range(max(self.out_indices) + 1):
            tokens = self.run_layer(index, tokens, hw)
            if index in self.out_indices:
                outputs[index] = self._format(tokens, hw)
        return tuple(outputs[index] for index in self.out_indices)

    def run_layer(
        self, index: int, tokens: Tensor, hw: tuple[int, int], *mixer_arguments: Any
    ) -> Tensor:
        """Apply one layer to tokens (B, T, C), behind the last one the final norm as well."""
        tokens = self._run(self.layers[index], tokens, hw, *mixer_arguments)
        if index == self.num_layers - 1:
            tokens = self.get_submodule(self.final_norm_name)(tokens)
        return tokens

    def _depth_of(self, name: str) -> int:
        if name == 'pos_embed' or name.startswith('patch_embed.'):
            return 0
        if name.startswith(f'{self.layers_name}.'):
            return int(name.split('.')[1]) + 1
        return self.num_depths - 1
