"""Layer-wise learning rate decay."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from linvis.registry import OPTIM_WRAPPER_CONSTRUCTORS

_PREFIX = 'backbone.'
_OPTIONS = (
    'layer_decay_rate',
    'norm_decay_mult',
    'bias_decay_mult',
    'flat_decay_mult',
    'custom_keys',
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Gives layers near the input a smaller learning rate.

    A backbone parameter of layer i of n learns with lr * layer_decay_rate ** (n - i - 1); what is
    outside the backbone learns with lr. The backbone says i and n with
    `get_layer_depth(param_name, prefix)`. Parameters with the same rate and weight decay share a
    group; frozen ones are left out.

    The options are those of mmpretrain's LearningRateDecayOptimWrapperConstructor, for models of
    mmpretrain, mmdet and mmseg alike. In `paramwise_cfg`, the first that applies counts:

    * custom_keys (dict): Substring of a parameter's name -> dict with `decay_mult`, `lr_mult`
      (both 1.0 by default); the longest matching substring counts.
    * norm_decay_mult (float): Factor of the weight decay of normalisation layers.
    * bias_decay_mult (float): The same for biases.
    * flat_decay_mult (float): The same for other parameters with one dimension.

    and, independent of these, layer_decay_rate (float, 1.0 by default).
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the optimizer wrapper.

        Raises:
            ValueError: If an option is unknown or the rate is not in (0, 1].
            TypeError: If the model has no backbone that knows the depth of its parameters.
        """
        unknown = sorted(set(self.paramwise_cfg) - set(_OPTIONS))
        if unknown:
            raise ValueError(
                f'paramwise_cfg takes {", ".join(_OPTIONS)}, got {", ".join(unknown)}.'
            )
        rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        if not 0 < rate <= 1:
            raise ValueError(f'layer_decay_rate must be in (0, 1], got {rate}.')
        return super().__call__(model)

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Adds the parameter groups of a model.

        Args:
            params: Groups of the optimizer; changed in place.
            module: The model, without a wrapper such as DistributedDataParallel.
            **kwargs: What the base class passes on in its recursion, of no use here.
        """
        backbone = getattr(module, 'backbone', None)
        if backbone is None or not hasattr(backbone, 'get_layer_depth'):
            found = f'{type(module).__name__}.backbone is {type(backbone).__name__}'
            raise TypeError(
                'LayerDecayOptimWrapperConstructor needs a backbone with get_layer_depth, but '
                f'{found}: use a linvis backbone or the default constructor.'
            )
        rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        groups: dict[tuple[int, float, float | None], dict] = {}
        for name, param, is_norm in _named_parameters(module):
            if not param.requires_grad:
                continue
            layer, count = backbone.get_layer_depth(name, _PREFIX)
            if not name.startswith(_PREFIX):
                layer = count - 1
            lr_mult, weight_decay = self._multipliers(name, param, is_norm)
            scale = rate ** (count - layer - 1) * lr_mult
            key = (layer, scale, weight_decay)
            if key not in groups:
                groups[key] = {'params': [], 'lr_scale': scale, 'layer_id': layer}
                if self.base_lr is not None:
                    groups[key]['lr'] = self.base_lr * scale
                if weight_decay is not None:
                    groups[key]['weight_decay'] = weight_decay
            groups[key]['params'].append(param)
        ordered = sorted(groups.values(), key=lambda group: group['layer_id'])
        params.extend(ordered)
        MMLogger.get_current_instance().info(_table(ordered))

    def _multipliers(
        self, name: str, param: nn.Parameter, is_norm: bool
    ) -> tuple[float, float | None]:
        """Returns the factor of the learning rate and the weight decay of one parameter."""
        cfg = self.paramwise_cfg
        custom: Mapping[str, Mapping[str, float]] = cfg.get('custom_keys', {})
        matches = [key for key in custom if key in name]
        lr_mult, decay_mult = 1.0, 1.0
        if matches:
            settings = custom[max(sorted(matches), key=len)]
            lr_mult = settings.get('lr_mult', 1.0)
            decay_mult = settings.get('decay_mult', 1.0)
        elif is_norm and cfg.get('norm_decay_mult') is not None:
            decay_mult = cfg['norm_decay_mult']
        elif name.rpartition('.')[2] == 'bias' and cfg.get('bias_decay_mult') is not None:
            decay_mult = cfg['bias_decay_mult']
        elif param.ndim == 1 and cfg.get('flat_decay_mult') is not None:
            decay_mult = cfg['flat_decay_mult']
        return lr_mult, None if self.base_wd is None else self.base_wd * decay_mult


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yields name, parameter and whether its module normalises; shared parameters once."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param not in seen:
                seen.add(param)
                yield f'{prefix}.{name}' if prefix else name, param, isinstance(module, kinds)


def _table(groups: list[dict]) -> str:
    lines = ['Layer-wise learning rates:', f'{"layer":>7}{"scale":>9}{"decay":>9}{"tensors":>9}']
    for group in groups:
        decay = group.get('weight_decay')
        text = '-' if decay is None else f'{decay:.3g}'
        lines.append(
            f'{group["layer_id"]:>7}{group["lr_scale"]:>9.4f}{text:>9}{len(group["params"]):>9}'
        )
    return '\n'.join(lines)
