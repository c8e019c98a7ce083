"""Reading a config, and what the command line changes in it."""

import argparse
import difflib
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import OPTIMIZERS
from mmengine.runner import Runner

from linvis.engine import config_keys
from linvis.engine.errors import LaunchError

_TASK_PACKAGES = {
    'mmpretrain': 'onedl-mmpretrain',
    'mmdet': 'onedl-mmdetection',
    'mmseg': 'onedl-mmsegmentation',
}
# Keys that mmengine reads out of the config besides the arguments of its runner.
_RUNNER_EXTRAS = {
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
}


def load_config(path: str, options: Sequence[str] = ()) -> Config:
    """Reads a config file and merges options of the form KEY=VALUE into it.

    Args:
        path: A .py, .yaml or .json file.
        options: Settings such as 'train_cfg.max_epochs=3'; later ones win.

    Returns:
        Config with the options merged in.

    Raises:
        LaunchError: If the file or one of its bases is missing or cannot be read, if an option
            is malformed or has a key that nobody reads, or if the library of its default_scope
            is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise LaunchError(f'Config {path} {_why_no_file(file)}.{_near_names(file)}')
    if file.suffix not in ('.py', '.yaml', '.yml', '.json'):
        raise LaunchError(
            f'Config {path} has the ending {file.suffix or "(none)"}: expected .py, .yaml or .json.'
        )
    try:
        cfg = Config.fromfile(path)
    # A config is a program of the user's: whatever it throws is theirs to mend.
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise LaunchError(
            f'Config {path} cannot be read: {type(error).__name__}: {reason}'
        ) from error
    there = _merge_options(cfg, options)
    if 'model' not in cfg:
        raise LaunchError(f'Config {path} has no `model`: is it a part meant for _base_?')
    scope = cfg.get('default_scope')
    if scope in _TASK_PACKAGES and importlib.util.find_spec(scope) is None:
        raise LaunchError(
            f'Config {path} needs {scope}, which is not installed: '
            f'pip install --no-deps {_TASK_PACKAGES[scope]}'
        )
    for option, count in there.items():
        unknown = config_keys.unknown_part(cfg, option.partition('=')[0], count)
        if unknown is not None:
            raise LaunchError(f'--cfg-options {option}: {unknown}.')
    return cfg


def set_work_dir(cfg: Config, work_dir: str | None, path: str) -> None:
    """Takes the work folder from the command line, else the config, else the config's name."""
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(path).stem)


def make_work_dir(cfg: Config) -> None:
    """Creates the work folder.

    Raises:
        LaunchError: If that is not possible.
    """
    try:
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f'Work folder {cfg.work_dir} cannot be created ({error.strerror}): name another with '
            '--work-dir.'
        ) from error


def require(cfg: Config, kind: str, path: str) -> None:
    """Checks that a config says all that training ('train') or testing ('test') needs."""
    needed = {
        'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
        'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
    }[kind]
    missing = [key for key in needed if cfg.get(key) is None]
    if missing:
        raise LaunchError(f'Config {path} cannot {kind}: it lacks {", ".join(missing)}.')
    if kind == 'train':
        _check_optimizer(cfg)


def enable_amp(cfg: Config) -> None:
    """Switches the optimizer wrapper to automatic mixed precision."""
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_lr_scaling(cfg: Config, path: str) -> None:
    """Lets mmengine scale the learning rate by batch size / base_batch_size.

    Raises:
        LaunchError: If the config does not say for which batch size its learning rate is meant.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise LaunchError(
            '--auto-scale-lr needs the batch size that the learning rate of '
            f'{path} is meant for: add auto_scale_lr = dict(base_batch_size=N) to the config.'
        )
    cfg.auto_scale_lr.enable = True


def make_resumable(cfg: Config) -> None:
    """Adds what lets training stop at a signal and go on in the middle of an epoch."""
    train_cfg = cfg.train_cfg
    if train_cfg.get('type') == 'EpochBasedTrainLoop' or train_cfg.get('by_epoch'):
        train_cfg.pop('by_epoch', None)
        train_cfg.type = 'linvis.ResumableEpochTrainLoop'
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook.get('type') == 'linvis.InterruptCheckpointHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, {'type': 'linvis.InterruptCheckpointHook'}]


def require_matching_checkpoint(cfg: Config, path: str, purpose: str) -> None:
    """Has a checkpoint compared with the model before its weights are used.

    Args:
        cfg: Config that gets the hook.
        path: Name of the checkpoint, for messages.
        purpose: 'test', 'resume' or 'start', see `CheckpointMatchHook`.
    """
    hook = {'type': 'linvis.CheckpointMatchHook', 'path': path, 'purpose': purpose}
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]


def _merge_options(cfg: Config, options: Sequence[str]) -> dict[str, int]:
    """Merges options and says how many parts of the key of each the config had before."""
    known = {*cfg, *inspect.signature(Runner).parameters, *_RUNNER_EXTRAS}
    there = {}
    for option in options:
        key, equals, _ = option.partition('=')
        if not equals or not key.strip('.'):
            raise LaunchError(
                f'--cfg-options takes KEY=VALUE, got {option!r}, e.g. train_cfg.max_epochs=3.'
            )
        top = key.partition('.')[0]
        if top not in known:
            near = difflib.get_close_matches(top, sorted(known), n=1)
            hint = f' (did you mean {near[0]}?)' if near else ''
            raise LaunchError(f'--cfg-options {option}: the config has no {top}{hint}.')
        there[option] = config_keys.parts_there(cfg, key)
    for option in options:
        _merge_option(cfg, option)
    return there


def _merge_option(cfg: Config, option: str) -> None:
    try:
        cfg.merge_from_dict(_parse_option(option))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = ' '.join(str(error.args[0] if error.args else error).split())
        raise LaunchError(f'--cfg-options {option} cannot be merged: {reason}') from error


def _check_optimizer(cfg: Config) -> None:
    """Tells an unknown optimizer, which mmengine takes for a class of no name."""
    name = cfg.optim_wrapper.get('optimizer', {}).get('type')
    with OPTIMIZERS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        if isinstance(name, str) and registry.get(name) is None:
            near = difflib.get_close_matches(name, OPTIMIZERS.module_dict, n=1)
            hint = f' (did you mean {near[0]}?)' if near else ''
            raise LaunchError(f'optim_wrapper.optimizer: there is no optimizer {name}{hint}.')


def _parse_option(option: str) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument('options', nargs='+', action=DictAction)
    return parser.parse_args(['--', option]).options


def _why_no_file(file: Path) -> str:
    return 'is a folder, not a file' if file.is_dir() else 'does not exist'


def _near_names(file: Path) -> str:
    """Names existing configs that look like a missing one."""
    roots = {file.parent, Path('configs')}
    found = {
        candidate
        for root in roots
        if root.is_dir()
        for candidate in (root.rglob('*.py') if root.name == 'configs' else root.glob('*.py'))
    }
    by_name = {candidate.name: candidate for candidate in sorted(found)}
    near = difflib.get_close_matches(file.with_suffix('.py').name, by_name, n=3, cutoff=0.75)
    return f' Did you mean {" or ".join(str(by_name[name]) for name in near)}?' if near else ''
