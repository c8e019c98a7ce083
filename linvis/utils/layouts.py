"""Names of weights in checkpoints of authors who have others than the models here.

Backbones have the authors' names already. What is left is how a whole classifier is put together:
in OpenMMLab's models the backbone's names begin with `backbone.`, and those of a linear head with
`head.fc.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

HEAD = 'head.fc.'

# A name that only checkpoints of the family have.
_VIG = re.compile(r'blocks\.\d+\.attn\.gk_proj\.')
_VIG_HIERARCHICAL = re.compile(r'layers\.(\d+)\.blocks\.\d+\.(?:op|self_attention)\.gk_proj\.')

_VIR = re.compile(r'blocks\.\d+\.retention\.qkv\.')
# Layer scale in files of ViR's older code.
_VIR_SCALE = re.compile(r'(blocks\.\d+)\.gamma_([12])$')

# Beginnings of names in files of the hierarchical family, some of them from its older code.
_VIG_HIERARCHICAL_NAMES = (
    (re.compile(r'patch_embed\.proj\.'), 'patch_embed.0.'),
    (re.compile(r'patch_embed\.norm\.'), 'patch_embed.2.'),
    (re.compile(r'(layers\.\d+\.blocks\.\d+)\.ln_1\.'), r'\1.norm.'),
    (re.compile(r'(layers\.\d+\.blocks\.\d+)\.self_attention\.'), r'\1.op.'),
    (re.compile(r'(?:classifier\.)?head\.'), HEAD),
)
_VIG_HIERARCHICAL_NORM = re.compile(r'(?:classifier\.)?norm\.')
# Linear layers of this family may be stored as convolutions of one pixel.
_VIG_LINEAR = re.compile(r'.*\.(?:qkv_proj|gk_proj\.\d|g_proj|o_proj|fc1|fc2)\.weight$')


def to_openmmlab_names(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the weights of a known classifier the names they have in an OpenMMLab classifier.

    Known are ViG, ViG-H and ViR. Weights that come without a head are taken for those of a backbone
    and get no prefix. What is not known is returned as it is.

    Args:
        state_dict: Weights, with or without the prefix `module.`.

    Returns:
        The weights in their order, linear layers in two dimensions; state_dict itself if there is
        nothing to be renamed.
    """
    names = [name.removeprefix('module.') for name in state_dict]
    if any(_VIG.match(name) for name in names):
        renamed = [re.sub(r'^head\.', HEAD, name) for name in names]
    elif any(_VIR.match(name) for name in names):
        renamed = [_VIR_SCALE.sub(r'\1.ls\2.gamma', re.sub(r'^head\.', HEAD, n)) for n in names]
    elif any(_VIG_HIERARCHICAL.match(name) for name in names):
        renamed = _vig_hierarchical_names(names)
    else:
        return state_dict
    if any(name.startswith(HEAD) for name in renamed):
        renamed = [name if name.startswith(HEAD) else f'backbone.{name}' for name in renamed]
    values = (
        value.flatten(1) if _VIG_LINEAR.match(name) and _is_pointwise(value) else value
        for name, value in state_dict.items()
    )
    return dict(zip(renamed, values, strict=True))


def _vig_hierarchical_names(names: list[str]) -> list[str]:
    stages = [int(match[1]) for name in names if (match := _VIG_HIERARCHICAL.match(name))]
    rules = (*_VIG_HIERARCHICAL_NAMES, (_VIG_HIERARCHICAL_NORM, f'outnorm{max(stages)}.'))
    for pattern, replacement in rules:
        names = [
            match.expand(replacement) + name[match.end() :]
            if (match := pattern.match(name))
            else name
            for name in names
        ]
    return names


def _is_pointwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape[2:] == (1, 1)
