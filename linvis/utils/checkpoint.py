"""Checkpoints: read without running code from the file, and put into a model with clear errors."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from linvis.utils.layouts import to_openmmlab_names

# Where training code of other projects keeps the weights, in the order of preference.
STATE_DICT_KEYS = ('state_dict', 'model', 'module', 'state_dict_ema', 'model_ema', 'ema')
# What training code puts before the names of a backbone or of a whole model.
WRAPPER_PREFIXES = ('', 'module.', 'backbone.', 'module.backbone.')

READ_ERRORS = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the message says why in one sentence."""


class LoadReport(NamedTuple):
    """Names that a non-strict load left out."""

    missing: list[str]
    unexpected: list[str]


def load_checkpoint(
    path: str | os.PathLike[str], map_location: str | torch.device = 'cpu'
) -> dict[str, Any]:
    """Read a checkpoint file without running code from it.

    Files of `torch.save` are read with `weights_only=True`; beyond tensors and plain containers
    only what checkpoints of mmengine and of the official training scripts hold is accepted, all of
    it data: logged scalars, numpy numbers and arrays, argument namespaces and yacs configs (as
    dicts). There is no fallback to unrestricted pickle.

    Args:
        path: File written by `torch.save`, or a safetensors file (`.safetensors`).
        map_location: Device for the tensors.

    Returns:
        The content; `find_state_dict` finds the weights in it.

    Raises:
        CheckpointError: If there is no such file, it is no checkpoint, is truncated, would run
            code or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'There is no checkpoint file {path}; check the path.')
    checkpoint: object
    if path.suffix == '.safetensors':
        checkpoint = _read_safetensors(path, map_location)
    else:
        checkpoint = _read_torch_file(path, map_location)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{path} holds no state dict but a {type(checkpoint).__name__}; '
            'save model.state_dict() or a dict with the entry state_dict.'
        )
    try:
        find_state_dict(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from None
    return checkpoint


def find_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint, which is a state dict itself or has one under a usual name.

    Raises:
        CheckpointError: If there is none.
    """
    candidates: list[Any] = [*(checkpoint.get(key) for key in STATE_DICT_KEYS), checkpoint]
    for candidate in candidates:
        if (
            isinstance(candidate, dict)
            and all(isinstance(name, str) for name in candidate)
            and any(isinstance(value, Tensor) for value in candidate.values())
        ):
            return candidate
    raise CheckpointError(
        f'no state dict found under {", ".join(STATE_DICT_KEYS)} or at the top, '
        f'only the entries {_examples([str(key) for key in checkpoint], 5)}.'
    )


def check_fits(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = '') -> None:
    """Tell a checkpoint of another architecture by its names and shapes.

    Tensors may be missing, as new ones of a model keep their initial values, and may lie beside
    what the module has, as another head or averaged weights do.

    Args:
        module: Module that is to take the weights.
        state_dict: Weights; entries outside prefix are ignored.
        prefix: Prefix of the module's names in state_dict.

    Raises:
        CheckpointError: If a tensor has another shape, if less than half of the module's tensors
            or only some layers of a list are there, or if there are further tensors under prefix
            or, without prefix, in a child of the module.
    """
    own = {f'{prefix}{name}': tensor for name, tensor in _tensors_of(module).items()}
    given = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    missing = sum(name not in given for name in own)
    reshaped = any(name in given and _reshaped(name, given[name], own[name]) for name in own)
    children = {name for name, _ in module.named_children()}
    surplus = any(
        name not in own and (prefix or name.partition('.')[0] in children)
        for name, value in given.items()
        if torch.is_tensor(value)
    )
    if reshaped or surplus or 2 * missing > len(own) or _lacks_layers(own, given):
        raise _does_not_fit(module, given, own)


def load_state_dict_into(
    module: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
) -> LoadReport:
    """Load weights into a backbone or a whole model, whatever they are wrapped in.

    Prefixes of training code (`module.`, `backbone.`) are stripped so that most names fit, and
    what does not have the prefix, such as the head for a backbone, is left out. Classifiers of
    authors who use neither get them first, see `linvis.utils.layouts`. Position embeddings of
    another resolution are resampled.

    Args:
        module: Backbone or model.
        source: Path of a checkpoint, or its content.
        strict: Refuse missing and unexpected names; otherwise log and return them.

    Returns:
        The missing and the unexpected names, both empty with `strict`.

    Raises:
        CheckpointError: If the file cannot be read or the weights do not fit.
    """
    checkpoint = source if isinstance(source, Mapping) else load_checkpoint(source)
    state_dict = to_openmmlab_names(find_state_dict(checkpoint))
    own = _tensors_of(module)

    def stripped(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix)
        }

    weights = max(map(stripped, WRAPPER_PREFIXES), key=lambda names: len(own.keys() & names.keys()))
    report = LoadReport(
        missing=[name for name in own if name not in weights],
        unexpected=[name for name in weights if name not in own],
    )
    if strict and any(report):
        raise _does_not_fit(module, weights, own)
    check_fits(module, weights)
    module.load_state_dict(weights, strict=False)
    if any(report):
        print_log(
            f'{type(module).__name__}: {len(report.missing)} tensors missing in the checkpoint '
            f'({_examples(report.missing)}), {len(report.unexpected)} unused '
            f'({_examples(report.unexpected)}).',
            logger='current',
        )
    return report


def register_safe_loader() -> None:
    """Make mmengine read checkpoints through `load_checkpoint`: init_cfg, load_from and resume.

    mmengine by itself falls back to unrestricted pickle, and runs the config text kept in a
    checkpoint when it resumes. Here code in a checkpoint never runs: that text is removed. Weights
    are found under any of the usual names, and those of known classifiers get the names they have
    in OpenMMLab's. URLs are downloaded first; object stores have to be.
    """
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_url, force=True)
    CheckpointLoader.register_scheme(
        [r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://'], load_from_store, force=True
    )


def load_from_local(
    filename: str, map_location: str | torch.device | None = None
) -> dict[str, Any]:
    """Loader of mmengine's protocol for files; see `register_safe_loader`."""
    checkpoint = load_checkpoint(Path(filename).expanduser(), map_location or 'cpu')
    state_dict = find_state_dict(checkpoint)
    if state_dict is checkpoint:
        return {'state_dict': to_openmmlab_names(state_dict)}
    checkpoint['state_dict'] = to_openmmlab_names(state_dict)
    message_hub = checkpoint.get('message_hub')
    runtime_info = message_hub.get('runtime_info') if isinstance(message_hub, dict) else None
    for record in (checkpoint.get('meta'), runtime_info):
        if isinstance(record, dict):
            # Python source that Runner.resume and inferencers would execute
            record.pop('config', None)
            record.pop('cfg', None)
    return checkpoint


def load_from_url(filename: str, map_location: str | torch.device | None = None) -> dict[str, Any]:
    """Loader of mmengine's protocol for http and https; the main process downloads once."""
    path = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(filename).path).name
    if is_main_process() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(filename, str(path))
    barrier()
    return load_from_local(str(path), map_location)


def load_from_store(filename: str, *_: object) -> None:
    """Loader of mmengine's protocol for object stores, which it would read unsafely."""
    raise CheckpointError(
        f'{filename} is in an object store, which is not read; copy it to a local file first.'
    )


def _read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, Tensor]:
    try:
        from safetensors import (  # type: ignore[import-not-found, unused-ignore]
            SafetensorError,
        )
        from safetensors.torch import (  # type: ignore[import-not-found, unused-ignore]
            load_file,
        )
    except ImportError:
        raise CheckpointError(
            f'{path} needs the package safetensors; install it with pip install safetensors.'
        ) from None
    try:
        return load_file(path, device=str(map_location))
    except SafetensorError as error:
        raise CheckpointError(f'{path} is no whole safetensors file ({error}).') from None


def _read_torch_file(path: Path, map_location: str | torch.device) -> object:
    with path.open('rb') as file:
        start = file.read(4)
    is_zip = start.startswith(b'PK')
    if not is_zip and not start.startswith(b'\x80'):
        raise CheckpointError(
            f'{path} is no checkpoint file ({path.stat().st_size} bytes, starting with {start!r}); '
            'check the path and the download.'
        )
    if is_zip and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f'{path} is truncated after {path.stat().st_size} bytes; copy or download it again.'
        )
    try:
        with torch.serialization.safe_globals(_data_types()), warnings.catch_warnings():
            # It asks to report what is no file of torch.save; the error below says that.
            warnings.filterwarnings('ignore', 'Detected pickle protocol', UserWarning)
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r'GLOBAL (\S+)|function (.+)|got (<.+>)', str(error))
        if refused is None and not is_zip:
            raise CheckpointError(
                f'{path} was refused because it is a Python pickle that cannot be read without '
                'running what it contains; ask its author for a file of torch.save.'
            ) from None
        if refused is None:
            raise CheckpointError(
                f'{path} is no readable checkpoint ({_first_line(error)}); download it again.'
            ) from None
        name = next(group for group in refused.groups() if group)
        raise CheckpointError(
            f'{path} was refused because it contains pickled code or objects ({name}), which may '
            'run anything; ask its author for a file of plain tensors.'
        ) from None
    except READ_ERRORS as error:
        raise CheckpointError(
            f'{path} is damaged, truncated or no checkpoint ({type(error).__name__}: '
            f'{_first_line(error)}); copy or download it again.'
        ) from None


def _data_types() -> list[Any]:
    """Types and functions besides PyTorch's own that checkpoints may name; none can run code."""
    # The functions that numpy names in its pickles, under the module names of numpy 2 and 1.
    scalar = np.float64(0).__reduce__()[0]
    reconstruct = np.zeros(1).__reduce__()[0]
    modules = ('numpy._core.multiarray', 'numpy.core.multiarray')
    dtypes = {type(np.dtype(code)) for code in np.typecodes['All'] if code not in 'OV'}
    return [
        HistoryBuffer,
        (_statistic_of_history_buffer, 'builtins.getattr'),
        argparse.Namespace,
        (OrderedDict, 'yacs.config.CfgNode'),
        np.ndarray,
        np.dtype,
        *dtypes,
        *((scalar, f'{module}.scalar') for module in modules),
        *((reconstruct, f'{module}._reconstruct') for module in modules),
    ]


def _statistic_of_history_buffer(owner: object, name: str) -> object:
    """Stand in for getattr, which the pickle of a HistoryBuffer names for its four statistics."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError('Unsupported global: GLOBAL builtins.getattr')
    return getattr(HistoryBuffer, name)


def _does_not_fit(
    module: nn.Module, given: Mapping[str, Any], own: Mapping[str, Tensor]
) -> CheckpointError:
    """The error for weights that are not those of the module, with one example of each kind."""
    reshaped = [name for name in own if name in given and _reshaped(name, given[name], own[name])]
    missing = [name for name in own if name not in given]
    unknown = [name for name in given if name not in own]
    reasons = []
    if reshaped:
        name = reshaped[0]
        there, here = tuple(given[name].shape), tuple(own[name].shape)
        reasons.append(
            f'{len(reshaped)} tensors have other shapes ({name} is {there} there, {here} here)'
        )
    if missing:
        reasons.append(f'{len(missing)} of {len(own)} tensors are missing ({_examples(missing)})')
    if unknown:
        reasons.append(f'{len(unknown)} are unknown here ({_examples(unknown)})')
    return CheckpointError(
        f'The checkpoint does not fit this {type(module).__name__}: {"; ".join(reasons)}; choose '
        "the architecture it was trained with, or strip a prefix (prefix='backbone.')."
    )


def _reshaped(name: str, given: Tensor, own: Tensor) -> bool:
    """Whether shapes differ by more than the number of positions, which is resampled on load."""
    if name.endswith('pos_embed') and given.ndim == own.ndim == 3:
        return given.shape[2] != own.shape[2]
    return given.shape != own.shape


def _lacks_layers(own: Iterable[str], given: Iterable[str]) -> bool:
    """Whether a list of layers is there in part only."""
    there = _numbered(given)
    lists = {name for name, _ in there}
    return any(name in lists for name, _ in _numbered(own) - there)


def _numbered(names: Iterable[str]) -> set[tuple[str, str]]:
    """The outermost lists that names of tensors are in, each with the number in the list."""
    matches = (re.match(r'(|.*?\.)(\d+)\.', name) for name in names)
    return {(match.group(1), match.group(2)) for match in matches if match}


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}


def _examples(names: Sequence[str], count: int = 2) -> str:
    if not names:
        return 'none'
    return ', '.join(names[:count]) + (', ...' if len(names) > count else '')


def _first_line(error: BaseException) -> str:
    return str(error).strip().split('\n')[0][:120]
