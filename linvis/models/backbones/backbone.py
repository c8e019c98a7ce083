from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linvis.models.layers.featmap import to_featmap
from linvis.utils.checkpoint import check_fits, register_safe_loader

OUT_TYPES = ('featmap', 'raw', 'avg_featmap')


class Backbone(BaseModule, ABC):
    """Contract of all backbones: pictures in, a tuple of features out.

    What follows speaks of layers; in a hierarchical backbone they are the stages.

    * Input: (B, in_channels, H, W) of any size >= 1 pixel.
    * Output: always a tuple, one entry for each of `out_indices`, in their order. Layers behind
      the last output are not run.
    * `strides` and `out_channels` tell the stride and the channels of each output.
    * A state dict of another architecture is refused, also by loaders that would only warn.
    * With zero drop rates, training and evaluation mode compute the same function.

    A subclass gives `layers`, `forward`, `_frozen_modules` and `_depth_of`, and calls `_freeze` at
    the end of its constructor.

    Args:
        in_channels: Channels of the pictures.
        channels: Channels of the output of each layer.
        strides: Stride of the output of each layer, in pixels.
        num_depths: Number of depths that `get_layer_depth` tells apart.
        out_indices: Index or indices of the layers to return; negative ones count from the end.
        out_type: 'featmap' (B, C, Hp, Wp), 'raw' (B, T, C) or 'avg_featmap' (B, C).
        frozen_stages: Freeze the embeddings and the first `frozen_stages` layers; 0 is the
            embeddings alone, -1 nothing. The norm behind a frozen output is frozen too.
        with_cp: Recompute activations in the backward pass instead of keeping them.
        init_cfg: Initialisation of mmengine, usually of type 'Pretrained'.

    Raises:
        ValueError: If out_indices, out_type or frozen_stages is not one of the above.
    """

    layers: nn.ModuleList
    out_types: ClassVar[tuple[str, ...]] = OUT_TYPES

    def __init__(
        self,
        *,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[int],
        num_depths: int,
        out_indices: int | Sequence[int],
        out_type: str,
        frozen_stages: int,
        with_cp: bool,
        init_cfg: dict[str, Any] | None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if out_type not in self.out_types:
            names = ', '.join(self.out_types)
            raise ValueError(f'out_type must be one of {names}, got {out_type!r}.')
        if not (isinstance(frozen_stages, int) and -1 <= frozen_stages <= len(channels)):
            raise ValueError(
                f'frozen_stages must be in -1..{len(channels)}, got {frozen_stages!r}.'
            )
        self.in_channels = in_channels
        self.num_layers = len(channels)
        self.num_depths = num_depths
        self.out_indices = _absolute_indices(out_indices, len(channels))
        self.out_channels = tuple(channels[index] for index in self.out_indices)
        self.strides = tuple(strides[index] for index in self.out_indices)
        self.out_type = out_type
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.register_load_state_dict_pre_hook(_refuse_other_architecture)

    def init_weights(self) -> None:
        """Initialise by init_cfg; files of weights are read by `load_checkpoint`: no code runs.

        That goes for all of mmengine's loading from then on, see `register_safe_loader`.
        """
        register_safe_loader()
        super().init_weights()

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of `out_indices` in the form of `out_type`."""

    @abstractmethod
    def _frozen_modules(self) -> list[nn.Module]:
        """Modules that `frozen_stages` freezes."""

    @abstractmethod
    def _depth_of(self, name: str) -> int:
        """Depth of a parameter, by its name in this backbone."""

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; frozen layers stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _check_images(self, images: Tensor) -> None:
        """Raise ValueError unless these are pictures (B, in_channels, H, W) that can be used."""
        channels = self.in_channels
        if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape:
            raise ValueError(
                f'{type(self).__name__} takes pictures (B, {channels}, H, W), at least one of at '
                f'least one pixel, got shape {tuple(images.shape)}.'
            )
        if not images.is_floating_point():
            raise ValueError(
                f'{type(self).__name__} takes floating-point pictures, got {images.dtype}; '
                'normalise them first, for example by the data_preprocessor.'
            )

    def _run(self, layer: nn.Module, tokens: Tensor, *arguments: Any) -> Tensor:
        """Apply a layer or block; with `with_cp` its activations are recomputed, not kept."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(layer, tokens, *arguments, use_reentrant=False)
        return layer(tokens, *arguments)

    def _format(self, tokens: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.out_type == 'raw':
            return tokens
        if self.out_type == 'avg_featmap':
            return tokens.mean(dim=1)
        return to_featmap(tokens, hw)

    to_featmap = staticmethod(to_featmap)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for a learning rate that decays with the distance from the output.

        Args:
            param_name: Name of the parameter, with prefix.
            prefix: Prefix of this backbone's parameters in the whole model, such as 'backbone.'.

        Returns:
            (depth, number of depths): 0 for the embeddings, i + 1 for layer i (of a hierarchical
            backbone, for block i counted over all stages), the last one for everything else, which
            includes parameters outside the backbone.
        """
        if not param_name.startswith(prefix):
            return self.num_depths - 1, self.num_depths
        return self._depth_of(param_name.removeprefix(prefix)), self.num_depths


def _refuse_other_architecture(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Stop where mmengine would only warn, and train from random weights."""
    if state_dict:
        check_fits(module, state_dict, prefix)


def _absolute_indices(out_indices: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Out_indices as a tuple of numbers from 0, checked."""
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    if not indices or not all(
        isinstance(index, int) and -num_layers <= index < num_layers for index in indices
    ):
        raise ValueError(
            f'out_indices must name at least one of {num_layers} layers or stages, '
            f'in {-num_layers}..{num_layers - 1}, got {out_indices!r}.'
        )
    return tuple(index % num_layers for index in indices)
