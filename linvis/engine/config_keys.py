"""Which keys a dict of a config can have, by the class that it is for."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmengine import registry as registries
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from torch.utils.data import DataLoader

# What reads the dicts of these names where they have no `type`.
_DEFAULTS: dict[str, Callable] = {
    'train_dataloader': DataLoader,
    'val_dataloader': DataLoader,
    'test_dataloader': DataLoader,
    'val_cfg': ValLoop,
    'test_cfg': TestLoop,
    'optim_wrapper': OptimWrapper,
    'log_processor': LogProcessor,
    'randomness': Runner.set_randomness,
}
# What mmengine takes besides, or by itself.
_EXTRAS = {
    'train_dataloader': {'num_batch_per_epoch'},
    'val_dataloader': {'num_batch_per_epoch'},
    'test_dataloader': {'num_batch_per_epoch'},
    'train_cfg': {'by_epoch'},
    # the last three for the wrapper of --amp, which comes later
    'optim_wrapper': {'constructor', 'paramwise_cfg', 'dtype', 'loss_scale', 'use_fsdp'},
    'env_cfg': {'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
    'auto_scale_lr': {'base_batch_size', 'enable'},
}
# Where the further arguments (`**kwargs`) of classes of mmengine go.
_FURTHER = {AmpOptimWrapper: OptimWrapper, CheckpointHook: Runner.save_checkpoint}
# Keys that the libraries take out of a dict before they call its class.
_TAKEN_OUT = {
    *('type', '_scope_', '_delete_'),  # anywhere
    *('convert_to_iter_based', 'priority'),  # schedules, hooks
    *('layer', 'name', 'override'),  # initial weights
    *('magnitude_key', 'magnitude_range'),  # policies of augmentations
    'bg_cls_weight',  # losses
    *('postfix', 'requires_grad', 'scale_factor', 'upsample_kernel'),  # layers
}
# Below these, types are names of another library.
_FOREIGN = {'Albu', 'Albumentations'}
_REGISTRIES = tuple(value for value in vars(registries).values() if isinstance(value, Registry))


def parts_there(cfg: Config, key: str) -> int:
    """How many parts of a key of the form 'param_scheduler.0.gamma' a config has."""
    return sum(there for _, _, there in _walk(cfg, key.split('.')))


def unknown_part(cfg: Config, key: str, first: int) -> str | None:
    """Says which part of a key nobody reads.

    A key is unknown in a dict whose `type` names classes or functions of the registries, if none
    of these has an argument of that name or takes any (`**kwargs`). The same holds for dicts of
    which mmengine itself knows what they are for, such as `train_dataloader`. Any other dict may
    have any key.

    Args:
        cfg: Config into which the key was merged.
        key: Such as 'model.backbone.drop_path_rate'.
        first: Number of the first part that is judged; those before are in the config file.

    Returns:
        A clause such as 'model.backbone (linvis.VRWKV) has no drop_path_rte (did you mean
        drop_path_rate?)', or None.
    """
    parts = key.split('.')
    scope = cfg.get('default_scope')
    for depth, (node, part, _) in enumerate(_walk(cfg, parts)):
        if depth == 0 or not isinstance(node, dict):
            continue
        if str(node.get('type')).rpartition('.')[2] in _FOREIGN:
            return None
        scope = node.get('_scope_', scope)
        known = _keys_of(node, parts[:depth], scope) if depth >= first else None
        if known is None or part in known | _TAKEN_OUT:
            continue
        near = difflib.get_close_matches(part, sorted(known), n=1)
        hint = f' (did you mean {near[0]}?)' if near else ''
        kind = node.get('type')
        of_kind = f' ({getattr(kind, "__name__", kind)})' if kind else ''
        return f'{".".join(parts[:depth])}{of_kind} has no {part}{hint}'
    return None


def _walk(cfg: Config, parts: Sequence[str]) -> Iterator[tuple[Any, str, bool]]:
    """Yields what each part of a key is looked up in, the part, and whether it is there."""
    node: Any = cfg
    for part in parts:
        container, there = node, False
        if isinstance(node, (dict, Config)):
            there = part in node
            node = node[part] if there else None
        elif isinstance(node, (list, tuple)):
            there = part.isdecimal() and int(part) < len(node)
            node = node[int(part)] if there else None
        yield container, part, there
        if not there:
            return


def _keys_of(node: dict, path: Sequence[str], scope: str | None) -> set[str] | None:
    """Keys that a dict of a config can have, None for any."""
    site = path[0] if len(path) == 1 else ''
    kind = node.get('type')
    called: Sequence[Callable]
    if isinstance(kind, str):
        called = _registered(kind, scope)
    elif kind is not None:
        called = [kind]
    elif site == 'train_cfg' and 'by_epoch' in node:
        called = [EpochBasedTrainLoop if node['by_epoch'] else IterBasedTrainLoop]
    elif site in _DEFAULTS:
        called = [_DEFAULTS[site]]
    elif site in _EXTRAS and site != 'train_cfg':
        return set(_EXTRAS[site])
    else:
        called = []
    known = set(_EXTRAS.get(site, ()))
    for function in called:
        names = _arguments(function)
        if names is None:
            return None
        known |= names
    return known if called else None


def _arguments(function: Callable) -> set[str] | None:
    """Names of the arguments of a class or function, None if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not of Python
        return None
    names = {parameter.name for parameter in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        further = _arguments(_FURTHER[function]) if function in _FURTHER else None
        return None if further is None else names | further
    return names


def _registered(name: str, scope: str | None) -> list[Callable]:
    """Classes and functions of a name in the registries, as seen from a scope."""
    names = [name] if scope is None or '.' in name else [f'{scope}.{name}', name]
    found: list[Callable] = []
    for registry in _REGISTRIES:
        try:
            entries = (registry.get(candidate) for candidate in names)
            entry = next((entry for entry in entries if entry is not None), None)
        except RuntimeError:  # a text that is no name
            continue
        if callable(entry) and entry not in found:
            found.append(entry)
    return found
