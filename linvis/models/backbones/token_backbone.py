from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linvis.models.layers.patch_embed import PatchEmbed
from linvis.models.layers.position import (
    resize_position_embedding,
    resize_position_embedding_on_load,
)
from linvis.utils.checkpoint import check_fits

OUT_TYPES = ('featmap', 'raw', 'avg_featmap')


class TokenBackbone(BaseModule, ABC):
    """Contract and forward pass shared by plain backbones: patches, positions, layers, outputs.

    A subclass builds its parts, passes them on, and states under which name the final norm is kept
    in state dicts.

    * Input: (B, in_channels, H, W) of any size >= 1 pixel. Sizes that are no multiple of the patch
      size are padded with zeros at the bottom and at the right, so the grid is (ceil(H / patch),
      ceil(W / patch)).
    * Output: always a tuple, one entry for each of `out_indices`, in their order. The output of
      the last layer is normalised, others are not. Layers behind the last output are not run.
    * The position embedding is learnt for the grid of `img_size` and resampled (bicubic) for any
      other grid, at run time and when a state dict of another resolution is loaded.
    * A state dict of another architecture is refused, also by loaders that would only warn.
    * With zero drop rates, training and evaluation mode compute the same function.

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
        ValueError: If out_indices, out_type or frozen_stages is not one of the above.
    """

    final_norm_name: ClassVar[str]

    def __init__(
        self,
        *,
        patch_embed: PatchEmbed,
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
        super().__init__(init_cfg=init_cfg)
        if out_type not in OUT_TYPES:
            raise ValueError(f'out_type must be one of {", ".join(OUT_TYPES)}, got {out_type!r}.')
        if not -1 <= frozen_stages <= len(layers):
            raise ValueError(f'frozen_stages must be in -1..{len(layers)}, got {frozen_stages}.')
        self.embed_dims = embed_dims
        self.num_layers = len(layers)
        self.patch_size = patch_embed.patch_size
        self.out_indices = _absolute_indices(out_indices, len(layers))
        self.strides = (self.patch_size,) * len(self.out_indices)
        self.out_type = out_type
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp

        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.pos_grid = patch_embed.grid_of(height, width)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.pos_grid[0] * self.pos_grid[1], embed_dims)
        )
        self.patch_embed = patch_embed
        self.layers = nn.ModuleList(layers)
        self.add_module(self.final_norm_name, final_norm)
        self.register_load_state_dict_pre_hook(resize_position_embedding_on_load)
        self.register_load_state_dict_pre_hook(_refuse_other_architecture)
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.pos_embed.requires_grad_(frozen_stages < 0)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        frozen = [self.patch_embed, *self.layers[: self.frozen_stages]]
        if self.frozen_stages == self.num_layers:
            frozen.append(self.get_submodule(self.final_norm_name))
        return frozen

    def train(self, mode: bool = True) -> TokenBackbone:
        """Set the mode; frozen layers stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions: (B, Hp * Wp, C), and the grid (Hp, Wp).

        Raises:
            ValueError: If images is not a floating-point batch (B, in_channels, H, W) of at least
                one pixel.
        """
        channels = self.patch_embed.in_channels
        if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
            raise ValueError(
                f'{type(self).__name__} takes pictures (B, {channels}, H, W) of at least one '
                f'pixel, got shape {tuple(images.shape)}.'
            )
        if not images.is_floating_point():
            raise ValueError(
                f'{type(self).__name__} takes floating-point pictures, got {images.dtype}; '
                'normalise them first, for example by the data_preprocessor.'
            )
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
            if self.with_cp and torch.is_grad_enabled():
                tokens = checkpoint(self.layers[index], tokens, hw, use_reentrant=False)
            else:
                tokens = self.layers[index](tokens, hw)
            if index == self.num_layers - 1:
                tokens = self.get_submodule(self.final_norm_name)(tokens)
            if index in self.out_indices:
                outputs[index] = self._format(tokens, hw)
        return tuple(outputs[index] for index in self.out_indices)

    def _format(self, tokens: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.out_type == 'raw':
            return tokens
        if self.out_type == 'avg_featmap':
            return tokens.mean(dim=1)
        return self.to_featmap(tokens, hw)

    @staticmethod
    def to_featmap(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
        """View tokens (B, Hp * Wp, C) as a map (B, C, Hp, Wp), channels-last without a copy."""
        return tokens.transpose(1, 2).unflatten(2, hw)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for a learning rate that decays with the distance from the output.

        Args:
            param_name: Name of the parameter, with prefix.
            prefix: Prefix of this backbone's parameters in the whole model, such as 'backbone.'.

        Returns:
            (depth, number of depths): 0 for the embeddings, i + 1 for layer i, the last one for
            everything else, which includes parameters outside the backbone.
        """
        depths = self.num_layers + 2
        name = param_name.removeprefix(prefix)
        if not param_name.startswith(prefix):
            return depths - 1, depths
        if name == 'pos_embed' or name.startswith('patch_embed.'):
            return 0, depths
        if name.startswith('layers.'):
            return int(name.split('.')[1]) + 1, depths
        return depths - 1, depths


def _refuse_other_architecture(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Stop where mmengine would only warn, and train from random weights."""
    if state_dict:
        check_fits(module, state_dict, prefix)


def _absolute_indices(out_indices: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Out_indices as a tuple of numbers from 0, checked."""
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    if not indices or not all(-num_layers <= index < num_layers for index in indices):
        raise ValueError(
            f'out_indices must name at least one of {num_layers} layers, '
            f'in {-num_layers}..{num_layers - 1}, got {out_indices!r}.'
        )
    return tuple(index % num_layers for index in indices)
