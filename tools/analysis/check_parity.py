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
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from linvis.models import VRWKV
from linvis.utils.checkpoint import load_state_dict_into

BOUND = 2e-4  # of ||ours - recorded|| / ||recorded||, in float32


class Family(NamedTuple):
    """How the models of a family are built, and what precedes their names in the authors' files."""

    build: Callable[[Mapping[str, Any]], nn.Module]
    prefix: str


def build_vrwkv(kwargs: Mapping[str, Any]) -> VRWKV:
    """VRWKV from the constructor arguments of the authors' class.

    Raises:
        ValueError: If an argument asks for what VRWKV of this project does not have.
    """
    # Arguments that tell how to train or initialise, which a loaded model does not depend on.
    ignored = {'drop_path_rate', 'drop_rate', 'init_mode', 'init_cfg', 'with_cp'}
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
    for name, value in kwargs.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(f'{name} must be {fixed[name]!r}, got {value!r}; no other is built.')
        if name not in {*ignored, *fixed, *arch, *passed_on, 'init_values', 'k_norm'}:
            raise ValueError(f'The argument {name}={value!r} of a vrwkv case is unknown.')
    return VRWKV(arch, **{name: kwargs[name] for name in passed_on if name in kwargs})


FAMILIES = {'vrwkv': Family(build_vrwkv, prefix='backbone.')}


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
        ValueError: If the family is unknown or its arguments are.
        CheckpointError: If the checkpoint layout of the case is not that of the model.
    """
    if meta['family'] not in FAMILIES:
        raise ValueError(
            f'The family {meta["family"]!r} of case {meta["case"]} is unknown; '
            f'known are {", ".join(FAMILIES)}.'
        )
    family = FAMILIES[meta['family']]
    model = family.build(meta['kwargs'])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'authors.pth'
        weights = {
            f'{family.prefix}{name}': torch.from_numpy(parameter_values(name, shape))
            for name, shape in meta['manifest'].items()
        }
        torch.save({'state_dict': weights, 'meta': {}}, path)
        load_state_dict_into(model, path)

    model.to(device).eval()
    images = picture(meta['batch'], meta['height'], meta['width'], meta['image_seed'])
    images = images.to(device).requires_grad_(with_gradients)
    with torch.set_grad_enabled(with_gradients):
        outputs = model(images)
    arrays = {f'out{index}': output for index, output in enumerate(outputs)}
    if with_gradients:
        ramps = [torch.linspace(-1, 1, output.numel(), device=device) for output in outputs]
        loss = sum(
            (output * ramp.view_as(output)).sum()
            for output, ramp in zip(outputs, ramps, strict=True)
        )
        loss.backward()
        parameters = dict(model.named_parameters())
        norms = [parameters[name].grad.norm() for name in meta['grad_names']]
        arrays |= {'loss': loss, 'grad_input': images.grad, 'grad_norms': torch.stack(norms)}
    return {name: value.detach().cpu().numpy() for name, value in arrays.items()}


def relative_error(ours: np.ndarray, recorded: np.ndarray) -> float:
    """||ours - recorded|| / ||recorded||; infinite if the shapes differ."""
    if ours.shape != recorded.shape:
        return math.inf
    ours, recorded = ours.astype(np.float64), recorded.astype(np.float64)
    return float(np.linalg.norm(ours - recorded) / np.linalg.norm(recorded))


def check(path: Path, device: str) -> bool:
    """Compare one case and tell whether all arrays are within the bound.

    Prints a line for each array. A case that cannot be computed fails with the reason on stderr.
    """
    try:
        with np.load(path, allow_pickle=False) as case:
            arrays = {name: case[name] for name in case.files}
        meta = json.loads(arrays.pop('meta').tobytes())
        ours = compute(meta, 'grad_input' in arrays, device)
    except (OSError, KeyError, ValueError) as error:
        print(f'{path}: {error}', file=sys.stderr)
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
    parser.add_argument('--device', default='cpu', help='device of the model (default: cpu)')
    args = parser.parse_args()
    results = [check(path, args.device) for path in args.cases]
    return 0 if all(results) else 1


if __name__ == '__main__':
    sys.exit(main())
