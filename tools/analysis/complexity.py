"""Count parameters and multiply-accumulates of a model.

    python tools/analysis/complexity.py CONFIG [--shape 512 512]
    python tools/analysis/complexity.py --backbone ViG --arch tiny

Convention: one multiply-accumulate (MAC) counts once, as in most papers, where it is called a FLOP;
PyTorch's counter counts two operations, so its numbers are halved. Counted are convolutions,
matrix products, and the operators of this project. Bi-WKV counts by its formula (13 operations per
token and channel in the forward pass). Operators with a matrix for a state count, whatever form
runs, as the recurrent one: for each token, direction and element of the state one MAC for the decay
of the state, one for the key and value added to it, and one for the query that reads it; retention
on a grid one more, for the running sum over the columns. So gated linear attention and retention
along the sequence have 3 MACs, retention over rows and columns 4. LayerNorm counts 5 for each
element, which is the rule of fvcore and what brings VRWKV-L to its published number; in ViG and
ViG-H norms are not counted. Activations and other pointwise work are not. The model is built
without memory and run on shapes alone. MACs are those of backbone and neck for one picture;
parameters are those of the whole model.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from linvis import compat
from linvis.engine.config import load_config
from linvis.engine.errors import user_sentence
from linvis.models import VRWKV, HybridViR, ViG, ViGHierarchical, ViR

BACKBONES = {
    backbone.__name__: backbone for backbone in (VRWKV, ViG, ViGHierarchical, ViR, HybridViR)
}
MACS_OF_LAYER_NORM = 5  # for each element
MACS_OF_STATE = 3  # for each token, direction and element: decay, update, query


class Complexity(NamedTuple):
    """Parameters by part of the model and multiply-accumulates by operator."""

    parameters: dict[str, int]
    macs: dict[str, float]


def _layer_norm_flops(shape: torch.Size, *_: Any, **__: Any) -> int:
    """Formula for PyTorch's counter, which passes shapes in place of tensors: two for each MAC."""
    return 2 * MACS_OF_LAYER_NORM * shape.numel()


def _bi_gla_flops(q_shape: torch.Size, _k: Any, v_shape: torch.Size, *_: Any, **__: Any) -> int:
    """The same for gated linear attention, of two directions."""
    return 2 * 2 * MACS_OF_STATE * q_shape.numel() * v_shape[-1]


def _retention_flops(
    q_shape: torch.Size,
    _k: Any,
    v_shape: torch.Size,
    _log_gamma: Any,
    columns: int,
    bidirectional: bool,
    *_: Any,
    **__: Any,
) -> int:
    """The same for retention, of one direction or two."""
    macs = MACS_OF_STATE + (columns > 1)
    return 2 * (1 + bidirectional) * macs * q_shape.numel() * v_shape[-1]


def measure(model: nn.Module, height: int, width: int) -> Complexity:
    """Count for one picture of height x width pixels.

    Args:
        model: Backbone, or a classifier, detector or segmentor, which has `extract_feat`; on the
            meta device, or any other.
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
    """
    device = next(model.parameters()).device
    features = getattr(model, 'extract_feat', model)
    model.eval()
    formulas: dict[Any, Any] = {
        torch.ops.linvis.bi_gla_fwd: _bi_gla_flops,
        torch.ops.linvis.retention_fwd: _retention_flops,
    }
    if not any(isinstance(module, ViG | ViGHierarchical) for module in model.modules()):
        for norm in (torch.ops.aten.native_layer_norm, torch.ops.linvis.layer_norm_fwd):
            formulas[norm] = _layer_norm_flops
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        features(torch.empty(1, 3, height, width, device=device))
    macs = {
        str(operator): operations / 2
        for operator, operations in counter.get_flop_counts()['Global'].items()
        if operations
    }
    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameters[name.partition('.')[0]] += parameter.numel()
    return Complexity(dict(parameters), macs)


def build(config: str | None, backbone: str, arch: str | None) -> nn.Module:
    """The model of a config file, or the backbone of an arch, on the meta device.

    Raises:
        LaunchError: If the config is missing, cannot be read or has no model.
    """
    settings = {'type': f'linvis.{backbone}', 'arch': arch}
    if config is not None:
        compat.install()  # before the config, which may inherit from the libraries
        cfg = load_config(config)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        settings = cfg.model
    with torch.device('meta'):
        return MODELS.build(settings)


def print_table(title: str, rows: Mapping[str, float], unit: str, scale: float) -> None:
    """Print rows and their sum."""
    print(f'{title} [{unit}]')
    for name, value in [*rows.items(), ('total', sum(rows.values()))]:
        print(f'  {name:<24} {value / scale:>12.4f}')


def main() -> int:
    """Count for the model of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('config', nargs='?', help='config file with a model')
    what.add_argument('--arch', help='arch of the backbone, such as tiny')
    parser.add_argument('--backbone', choices=sorted(BACKBONES), default='VRWKV')
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'))
    args = parser.parse_args()
    try:
        complexity = measure(build(args.config, args.backbone, args.arch), *args.shape)
    except Exception as error:
        sentence = user_sentence(error)
        if sentence is None:
            raise
        print(f'{parser.prog}: {sentence}', file=sys.stderr)
        return 1
    print(f'picture: 1 x 3 x {args.shape[0]} x {args.shape[1]}')
    print_table('parameters', complexity.parameters, 'M', 1e6)
    print_table('multiply-accumulates of backbone and neck', complexity.macs, 'G', 1e9)
    return 0


if __name__ == '__main__':
    sys.exit(main())
