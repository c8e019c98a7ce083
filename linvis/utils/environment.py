"""What is installed and which operators run on what, for reports and the head of a log."""

import importlib.metadata
import importlib.util
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import linvis

# Name to show -> distributions that provide it (the first one is what to install), pip options.
_PACKAGES: Mapping[str, tuple[Sequence[str], str]] = {
    'torch': (('torch',), ''),
    'torchvision': (('torchvision',), ''),
    'triton': (('triton', 'pytorch-triton', 'pytorch-triton-rocm', 'triton-windows'), ''),
    'numpy': (('numpy',), ''),
    'opencv': (
        (
            'opencv-python-headless',
            'opencv-python',
            'opencv-contrib-python-headless',
            'opencv-contrib-python',
        ),
        '',
    ),
    'mmengine': (('onedl-mmengine', 'mmengine', 'mmengine-lite'), '--no-deps '),
    'mmcv': (('onedl-mmcv', 'mmcv', 'mmcv-lite'), '--no-deps '),
    'mmpretrain': (('onedl-mmpretrain', 'mmpretrain'), '--no-deps '),
    'mmdet': (('onedl-mmdetection', 'mmdet'), '--no-deps '),
    'mmseg': (('onedl-mmsegmentation', 'mmsegmentation'), '--no-deps '),
    'tensorboard': (('tensorboard',), ''),
    'matplotlib': (('matplotlib',), ''),
}
# Operators that run as their definition in plain PyTorch, without a choice of backends.
_WITHOUT_CHOICE = ('ms_deform_attn',)
_COCO_EVALUATORS = ('faster-coco-eval', 'pycocotools')
# Folder -> what must be in it.
_DATA_FOLDERS = {
    'data/imagenet': ('train', 'val'),
    'data/coco': ('annotations', 'train2017', 'val2017'),
    'data/ade/ADEChallengeData2016': ('images', 'annotations'),
    'data/mini/imagenet': (),
    'data/mini/coco': (),
    'data/mini/ade': (),
}
Report = dict[str, dict[str, str]]


def collect_environment(root: Path | None = None) -> Report:
    """Collects versions, devices, operators and data folders; nothing needs to be there.

    Args:
        root: Folder that holds `data/`; default: the current one.

    Returns:
        Section -> name -> text. A missing package reads 'missing: pip install ...'.
    """
    return {
        'System': _system(),
        'Packages': {name: package_version(name) for name in _PACKAGES},
        'Devices': _devices(),
        'Operators': _operators_or_error(),
        'Libraries': {'mmcv._ext': mmcv_extension(), 'COCO evaluation': coco_evaluator()},
        'Data': _data_folders(root or Path()),
    }


def format_environment(report: Report) -> str:
    """Lays a report out as a text table."""
    width = max(len(name) for section in report.values() for name in section)
    lines = []
    for title, section in report.items():
        lines.append(title)
        lines += [f'  {name:<{width}}  {text}' for name, text in section.items()]
    return '\n'.join(lines)


def startup_lines(placement: str) -> list[str]:
    """Says in a few lines what a run runs on.

    Args:
        placement: Device and processes, e.g. 'cpu, 1 process'.

    Returns:
        Lines to print: versions, device, operators.
    """
    versions = [f'linvis {linvis_version()}', f'Python {platform.python_version()}']
    versions += [
        f'{name} {package_version(name)}'
        for name in ('torch', 'triton', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg')
        if not package_version(name).startswith('missing')
    ]
    operators = [f'{name}: {text}' for name, text in operator_backends().items()]
    return [
        'Versions   ' + ', '.join(versions),
        f'Runs on    {placement}',
        'Operators  ' + '; '.join(operators),
        f'mmcv._ext  {mmcv_extension()}',
    ]


def linvis_version() -> str:
    """Returns the version of linvis and, in a git checkout, the commit."""
    folder = Path(linvis.__file__).resolve().parents[1]
    commit = ''
    if (folder / '.git').exists():
        commit = _output_of(['git', '-C', str(folder), 'rev-parse', '--short', 'HEAD'])
    return f'{linvis.__version__} (commit {commit})' if commit else linvis.__version__


def package_version(name: str) -> str:
    """Returns the version of a package of the stack, or the command that installs it."""
    distributions, options = _PACKAGES[name]
    for distribution in distributions:
        version = _installed(distribution)
        if version is not None:
            return version if distribution == name else f'{version} ({distribution})'
    return f'missing: pip install {options}{distributions[0]}'


def operator_backends() -> dict[str, str]:
    """Returns, for each operator, the backend that runs here and why others do not.

    Of an operator that has only its definition in PyTorch it is 'reference (the only one)'.

    Raises:
        BackendUnavailableError: If LINVIS_OPS_BACKEND names a backend that no operator has, or
            that cannot run here.
    """
    if importlib.util.find_spec('linvis_ops') is None:
        return {'linvis_ops': 'missing: pip install -e . in the folder of linvis'}
    from linvis_ops import available_backends, default_backend, operators

    wanted = os.environ.get('LINVIS_OPS_BACKEND', 'auto')
    described = {}
    for name in operators():
        reasons = available_backends(name)
        chosen = default_backend(name)
        preferred = itertools.takewhile(chosen.__ne__, reasons)
        others = [f'no {backend}: {reasons[backend]}' for backend in preferred if reasons[backend]]
        if wanted not in ('auto', *reasons):
            others.append(f'it has no backend {wanted}')
        described[name] = f'{chosen} ({"; ".join(others)})' if others else chosen
    for name in _WITHOUT_CHOICE:
        described.setdefault(name, 'reference (the only one)')
    return dict(sorted(described.items()))


def _operators_or_error() -> dict[str, str]:
    try:
        return operator_backends()
    except RuntimeError as error:
        return {'error': str(error)}


def mmcv_extension() -> str:
    """Says whether mmcv's compiled operators or their stand-in are in use."""
    if package_version('mmcv').startswith('missing'):
        return 'none: mmcv is missing'
    module = sys.modules.get('mmcv._ext')
    if module is None:
        spec = importlib.util.find_spec('mmcv')
        folders = spec.submodule_search_locations if spec is not None else None
        compiled = any(list(Path(folder).glob('_ext.*')) for folder in folders or ())
    else:
        compiled = getattr(module, '__file__', None) is not None
    return 'compiled' if compiled else 'stand-in of linvis (torchvision and linvis_ops)'


def coco_evaluator() -> str:
    """Returns the package that computes COCO's metrics."""
    for distribution in _COCO_EVALUATORS:
        version = _installed(distribution)
        if version is not None:
            return f'{distribution} {version}'
    return f'missing: pip install {_COCO_EVALUATORS[0]}'


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> dict[str, str]:
    return {
        'linvis': linvis_version(),
        'Python': f'{platform.python_version()} ({sys.executable})',
        'platform': platform.platform(),
    }


def _devices() -> dict[str, str]:
    devices = {'CPU threads': str(torch.get_num_threads())}
    devices['CUDA of torch'] = torch.version.cuda or 'none: a build for CPUs'
    if not torch.cuda.is_available():
        devices['GPU'] = 'none'
        return devices
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    devices['driver'] = _output_of(query).split('\n')[0] or 'unknown'
    for index in range(torch.cuda.device_count()):
        info = torch.cuda.get_device_properties(index)
        memory = info.total_memory / 2**30
        devices[f'GPU {index}'] = f'{info.name}, {memory:.0f} GiB, sm_{info.major}{info.minor}'
    return devices


def _data_folders(root: Path) -> dict[str, str]:
    described = {}
    for name, parts in _DATA_FOLDERS.items():
        folder = root / name
        if not folder.is_dir():
            described[name] = 'not there'
            continue
        absent = [part for part in parts if not (folder / part).exists()]
        described[name] = f'lacks {", ".join(absent)}' if absent else 'found'
    return described


def _output_of(command: list[str]) -> str:
    """Returns what a program prints, or nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ''
    return done.stdout.strip() if done.returncode == 0 else ''
