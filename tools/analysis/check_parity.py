"""Compare models with recorded outputs of the authors' code.

A case is an .npz file. Its entry `meta` (JSON) tells the model, the checkpoint layout and the
picture; the other entries are what the authors' code computes. A case holds no weights: the values
of a parameter follow from its name and shape, and so does the picture from a seed. The tool
builds that checkpoint, saves it, loads it as a user loads the authors' file, and compares.

    python tools/analysis/check_parity.py CASE.npz ...

It prints a line for each array: case, array, relative error, bound, PASS or FAIL; it exits with 1
if one fails. A case that cannot be computed has the one line `case - - - FAIL`, with the reason on
stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from linvis.engine.devices import resolve_placement
from linvis.engine.errors import LaunchError
from linvis.models import VRWKV, ViG, ViGHierarchical, ViR
from linvis.utils.checkpoint import load_state_dict_into
from linvis.utils.layouts import to_openmmlab_names

BOUND = 2e-4  # of ||ours - recorded|| / ||recorded||, in float32


class Family(NamedTuple):
    """How the models of a family are built, and how the authors keep their weights in files."""

    build: Callable[[Mapping[str, Any]], nn.Module]  # from the `meta` of a case
    entry: str  # of the file
    prefix: str = ''  # of the names
    outputs: tuple[str, ...] = ()  # names of the arrays; none: out0, out1, ..
    entries: tuple[str, ...] = ()  # what the `meta` of its cases has beside the entries of all


# What the `meta` of every case has.
ENTRIES = ('case', 'family', 'kwargs', 'manifest', 'batch', 'height', 'width', 'image_seed')

# Forms of retention by which a case may have been computed.
RETENTION_MODES = ('parallel', 'recurrent', 'chunkwise')

# Arguments that tell how to train or initialise, which a loaded model does not depend on.
TRAINING = {'drop_path_rate', 'drop_rate', 'init_mode', 'init_cfg', 'pretrained', 'with_cp'}


def check_arguments(
    family: str, kwargs: Mapping[str, Any], fixed: Mapping[str, Any], known: Collection[str]
) -> None:
    """Check the constructor arguments of the authors' class.

    Args:
        family: Name for messages.
        kwargs: The arguments.
        fixed: Those that have one value here.
        known: Others that are understood or of no effect.

    Raises:
        ValueError: If an argument asks for what the model of this project does not have.
    """
    for name, value in kwargs.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(f'{name} must be {fixed[name]!r}, got {value!r}; no other is built.')
        if name not in {*TRAINING, *fixed, *known}:
            raise ValueError(f'The argument {name}={value!r} of a {family} case is unknown.')


def build_vrwkv(kwargs: Mapping[str, Any]) -> VRWKV:
    """VRWKV from the constructor arguments of the authors' class.

    Raises:
        ValueError: If an argument asks for what VRWKV of this project does not have.
    """
    fixed = {
        'channel_gamma': 0.25,
        'shift_pixel': 1,
        'shift_mode': 'q_shift',
        'hidden_rate': 4,
        'final_norm': True,
        'interpolate_mode': 'bicubic',
    }
    arch = {
        'embed_dims': kwargs.get('embed_dims', 256),
        'depth': kwargs.get('depth', 12),
        'post_norm': kwargs.get('post_norm', False),
        'key_norm': kwargs.get('key_norm', kwargs.get('k_norm', False)),
        'layer_scale_init': kwargs.get('init_values'),
    }
    passed_on = {'img_size', 'patch_size', 'in_channels', 'out_indices'}
    check_arguments('vrwkv', kwargs, fixed, {*arch, *passed_on, 'init_values', 'k_norm'})
    return VRWKV(arch, **{name: kwargs[name] for name in passed_on if name in kwargs})


# What both families of ViG have in one form.
VIG_FIXED = {'expand_k': 0.5, 'expand_v': 1.0, 'hidden_act': 'swish', 'rope_mode': 'none'}


def build_vig(kwargs: Mapping[str, Any]) -> nn.Module:
    """ViG from the constructor arguments of the authors' class, with its head if it has one.

    Raises:
        ValueError: If an argument asks for what ViG of this project does not have.
    """
    fixed = VIG_FIXED | {
        'if_cls_token': False,
        'use_middle_cls_token': False,
        'if_abs_pos_embed': True,
        'if_rc_pe': False,
        'use_msg': False,
        'use_dirpe': False,
        'use_lower_bound': False,
        'use_swiglu': True,
        'scan_mode': 'default',
        'patch_embed_version': 'v2',
        'use_bias_in_patch': True,
        'use_act_in_patch': False,
        'use_bias_in_dwconv': False,
        'init_values': None,
    }
    modes = {'feat': 'featmap', 'avgpool': 'avg_featmap'}
    mode = kwargs.get('classification_mode', 'avgpool')
    if mode not in modes:
        raise ValueError(f'classification_mode must be one of {", ".join(modes)}, got {mode!r}.')
    translated = {'img_size': 'img_size', 'patch_size': 'patch_size', 'channels': 'in_channels'}
    understood = {'classification_mode', 'num_classes', *translated}
    arch = {
        'embed_dims': kwargs.get('embed_dim', 192),
        'depth': kwargs.get('depth', 12),
        'num_heads': kwargs.get('num_heads', 2),
        'conv_act': kwargs.get('use_act_in_conv', True),
        'out_act': kwargs.get('use_out_act', False),
    }
    shape = {'embed_dim', 'depth', 'num_heads', 'use_act_in_conv', 'use_out_act'}
    no_effect = {'stride', 'pt_hw_seq_len', 'attn_model', 'use_out_gate'}
    check_arguments('vig', kwargs, fixed, {*understood, *shape, *no_effect})
    options = {ours: kwargs[theirs] for theirs, ours in translated.items() if theirs in kwargs}
    backbone = ViG(arch, out_type=modes[mode], **options)
    classes = kwargs.get('num_classes', 1000)
    return Classifier(backbone, arch['embed_dims'], classes) if classes else backbone


def build_vig_hierarchical(kwargs: Mapping[str, Any], with_classes: bool) -> nn.Module:
    """ViG-H from the constructor arguments of the authors' classes.

    Args:
        kwargs: The arguments.
        with_classes: Whether it is the class with a head, or the one with an output of each stage.

    Raises:
        ValueError: If an argument asks for what ViG-H of this project does not have.
    """
    fixed = VIG_FIXED | {
        'patch_size': 4,
        'patch_norm': True,
        'use_act_in_conv': False,
        'use_out_act': False,
        'gmlp': True,
        'mlp_drop_rate': 0.0,
        'norm_layer': 'ln2d',
        'downsample_version': 'v3',
        'patchembed_version': 'v2',
    }
    dims = kwargs.get('dims', [96, 192, 384, 768])
    arch = {
        'embed_dims': dims if isinstance(dims, int) else dims[0],
        'depths': kwargs.get('depths', [2, 2, 9, 2]),
        'num_heads': kwargs.get('num_heads', [3, 6, 12, 24]),
    }
    understood = {'dims', 'depths', 'num_heads', 'in_chans', 'num_classes', 'out_indices'}
    no_effect = {'attn_models', 'mlp_ratio', 'mlp_act_layer', 'use_checkpoint'}
    check_arguments('vig_h', kwargs, fixed, {*understood, *no_effect})
    in_channels, stages = kwargs.get('in_chans', 3), len(arch['depths'])
    if not with_classes:
        out_indices = kwargs.get('out_indices', range(stages))
        return ViGHierarchical(arch, in_channels=in_channels, out_indices=out_indices)
    backbone = ViGHierarchical(arch, in_channels=in_channels, out_type='avg_featmap')
    return Classifier(backbone, backbone.out_channels[0], kwargs.get('num_classes', 1000))


def build_vir(case: Mapping[str, Any]) -> nn.Module:
    """ViR from the constructor arguments of the authors' class and the decay that the case names.

    The form that computed the case, `mode`, chooses nothing here: without the authors' softmax all
    forms are one function, by the tests of retention, and compared is the form that users run.

    Raises:
        ValueError: If an argument or the mode asks for what ViR of this project does not have.
    """
    mode = case.get('mode')
    if mode is not None and mode not in RETENTION_MODES:
        raise ValueError(f'mode must be one of {", ".join(RETENTION_MODES)}, got {mode!r}.')
    kwargs = case['kwargs']
    fixed = {'mlp_ratio': 4.0, 'qkv_bias': True, 'global_pool': 'token_last'}
    translated = {'img_size': 'img_size', 'patch_size': 'patch_size', 'in_chans': 'in_channels'}
    arch = {
        'embed_dims': kwargs.get('embed_dim', 768),
        'depth': kwargs.get('depth', 12),
        'num_heads': kwargs.get('num_heads', 12),
    }
    understood = {'embed_dim', 'depth', 'num_heads', 'num_classes', 'init_values', *translated}
    check_arguments('vir', kwargs, fixed, understood)
    # a case may be recorded with position embeddings for the size of its picture
    options: dict[str, Any] = {'img_size': (case['height'], case['width'])}
    options |= {ours: kwargs[theirs] for theirs, ours in translated.items() if theirs in kwargs}
    backbone = ViR(arch, retention=case['retention'], out_type='raw', **options)
    return TokenClassifier(backbone, arch['embed_dims'], kwargs.get('num_classes', 1000))


class TokenClassifier(nn.Module):
    """Backbone of tokens, the last one for the class, and linear head."""

    def __init__(self, backbone: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(channels, classes)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens and the class scores."""
        tokens = self.backbone(images)[0]
        return tokens, self.head(tokens[:, -1])


class Classifier(nn.Module):
    """Backbone of pooled features and linear head, under the names of mmpretrain's classifier."""

    def __init__(self, backbone: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(channels, classes)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Class scores, alone in a tuple."""
        return (self.head(self.backbone(images)[0]),)


FAMILIES = {
    'vrwkv': Family(lambda case: build_vrwkv(case['kwargs']), 'state_dict', prefix='backbone.'),
    'vig': Family(lambda case: build_vig(case['kwargs']), 'model'),
    'vig_h': Family(lambda case: build_vig_hierarchical(case['kwargs'], True), 'model'),
    'vig_h_backbone': Family(lambda case: build_vig_hierarchical(case['kwargs'], False), 'model'),
    'vir': Family(build_vir, 'state_dict', outputs=('tokens', 'logits'), entries=('retention',)),
}


def parameter_values(name: str, shape: Sequence[int]) -> np.ndarray:
    """Values of a parameter or buffer, from its name and shape alone.

    The last part of the name tells the role, and the role the distribution, so that no branch of
    a network vanishes or explodes. The seed is the CRC-32 of the name.
    """
    random = np.random.default_rng(zlib.crc32(name.encode()))
    role = name.split('.')[-1]

    def normal(scale: float) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    def uniform(low: float, high: float) -> np.ndarray:
        return random.uniform(low, high, shape).astype(np.float32)

    if role == 'num_batches_tracked':
        return np.zeros(shape, np.int64)
    if role == 'running_mean':
        return normal(0.1)
    if role == 'running_var':
        return uniform(0.5, 1.5)
    if role in ('spatial_decay', 'spatial_first', 'time_faaaa'):
        return uniform(-1.0, 2.0)
    if role == 'time_decay':
        return uniform(-5.0, -1.0)
    mixing_weights = ('spatial_mix', *(f'time_maa_{target}' for target in 'xkvrg'))
    if role.startswith(mixing_weights) or role == 'time_maa_w':
        return uniform(0.0, 1.0)
    if role.startswith(('gamma', 'ls')) or (role == 'weight' and len(shape) == 1):
        return uniform(0.5, 1.5)
    if len(shape) < 2 or 'pos_embed' in role or role in ('cls_token', 'level_embed'):
        return normal(0.1)
    fan_in = math.prod(shape[1:]) if role == 'weight' else shape[-2]
    return (random.standard_normal(shape) / math.sqrt(fan_in)).astype(np.float32)


def picture(batch: int, height: int, width: int, seed: int) -> Tensor:
    """Random pictures of mean 0 and variance 1, shape (batch, 3, height, width)."""
    values = np.random.default_rng(seed).standard_normal((batch, 3, height, width))
    return torch.from_numpy(values.astype(np.float32))


def compute(meta: Mapping[str, Any], with_gradients: bool, device: str) -> dict[str, np.ndarray]:
    """What our model gives for a case, under the names of the case's arrays.

    Raises:
        ValueError: If an argument of the model is unknown.
        CheckpointError: If the checkpoint layout of the case is not that of the model.
    """
    family = FAMILIES[meta['family']]
    model = family.build(meta)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'authors.pth'
        weights = {
            f'{family.prefix}{name}': torch.from_numpy(parameter_values(name, shape))
            for name, shape in meta['manifest'].items()
        }
        torch.save({family.entry: weights}, path)
        load_state_dict_into(model, path)

    model.to(device).eval()
    images = picture(meta['batch'], meta['height'], meta['width'], meta['image_seed'])
    images = images.to(device).requires_grad_(with_gradients)
    with torch.set_grad_enabled(with_gradients):
        outputs = model(images)
    names = family.outputs or [f'out{index}' for index in range(len(outputs))]
    arrays = dict(zip(names, outputs, strict=True))
    if with_gradients:
        ramps = [torch.linspace(-1, 1, output.numel(), device=device) for output in outputs]
        loss = sum(
            (output * ramp.view_as(output)).sum()
            for output, ramp in zip(outputs, ramps, strict=True)
        )
        loss.backward()
        ours = (name.removeprefix(family.prefix) for name in to_openmmlab_names(weights))
        own_name = dict(zip(meta['manifest'], ours, strict=True))
        parameters = dict(model.named_parameters())
        gradients: list[Any] = [parameters[own_name[name]].grad for name in meta['grad_names']]
        norms = [gradient.norm() for gradient in gradients]
        arrays |= {'loss': loss, 'grad_input': images.grad, 'grad_norms': torch.stack(norms)}
    return {name: value.detach().cpu().numpy() for name, value in arrays.items()}


def relative_error(ours: np.ndarray, recorded: np.ndarray) -> float:
    """||ours - recorded|| / ||recorded||; infinite if the shapes differ."""
    if ours.shape != recorded.shape:
        return math.inf
    ours, recorded = ours.astype(np.float64), recorded.astype(np.float64)
    return float(np.linalg.norm(ours - recorded) / np.linalg.norm(recorded))


def read_case(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The `meta` of a case and its other arrays.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no case, lacks something, or is of a family that is not known here.
    """
    try:
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as case:
            arrays = {name: case[name] for name in case.files}
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f'it is no whole .npz file ({error}).') from None
    if 'meta' not in arrays:
        raise ValueError("it lacks the entry 'meta', so it is no case.")
    meta = json.loads(arrays.pop('meta').tobytes())
    if not isinstance(meta, dict):
        raise ValueError(f'its meta must be an object, got {meta!r}.')
    _require(meta, ENTRIES)
    if meta['family'] not in FAMILIES:
        raise ValueError(
            f'The family {meta["family"]!r} of case {meta["case"]} is unknown; '
            f'known are {", ".join(FAMILIES)}.'
        )
    with_gradients = ('grad_names',) if 'grad_input' in arrays else ()
    _require(meta, (*FAMILIES[meta['family']].entries, *with_gradients))
    return meta, arrays


def _require(meta: Mapping[str, Any], entries: Sequence[str]) -> None:
    missing = [entry for entry in entries if entry not in meta]
    if missing:
        raise ValueError(f'its meta lacks {", ".join(missing)}.')


def check(path: Path, device: str) -> bool:
    """Compare one case and tell whether all arrays are within the bound.

    Prints a line for each array. A case that cannot be computed fails with the reason on stderr.
    """
    try:
        meta, arrays = read_case(path)
        ours = compute(meta, 'grad_input' in arrays, device)
    except Exception as reason:
        if isinstance(reason, (OSError, ValueError)):
            print(f'{path}: {reason}', file=sys.stderr)
        else:  # a bug here or in a case, which must not keep the other cases from being checked
            traceback.print_exc()
        print(f'{path.stem} - - - FAIL')
        return False
    passed = True
    for name, recorded in arrays.items():
        error = relative_error(ours[name], recorded) if name in ours else math.inf
        verdict = error <= BOUND  # False for NaN
        passed &= verdict
        print(f'{meta["case"]} {name} {error:.2e} {BOUND:.0e} {"PASS" if verdict else "FAIL"}')
    return passed


def main() -> int:
    """Check the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('cases', nargs='+', type=Path, metavar='CASE.npz')
    parser.add_argument(
        '--device', default='cpu', help='auto (a GPU if there is one), cpu, cuda, cuda:N'
    )
    args = parser.parse_args()
    try:
        device = resolve_placement(args.device, 'none').device
    except LaunchError as error:
        print(f'{parser.prog}: {error}', file=sys.stderr)
        return 1
    results = [check(path, device) for path in args.cases]
    return 0 if all(results) else 1


if __name__ == '__main__':
    sys.exit(main())
