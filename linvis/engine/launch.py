"""What tools/train.py and tools/test.py do, for the three tasks alike."""

import argparse
from pathlib import Path
from typing import Any

import torch.distributed
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import dump
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, find_latest_checkpoint

from linvis import compat
from linvis.datasets.checks import check_dataset_cfg, check_evaluator_cfg
from linvis.engine import config as configs
from linvis.engine.checkpoint_match import check_resumable
from linvis.engine.devices import Placement, join_processes, resolve_placement
from linvis.engine.errors import LaunchError
from linvis.engine.files import out_file
from linvis.engine.runner import TaskRunner
from linvis.utils.checkpoint import load_checkpoint, register_safe_loader
from linvis.utils.environment import startup_lines

_VISUALIZATION_HOOKS = {
    'mmpretrain': 'linvis.ClassDrawingHook',
    'mmdet': 'DetVisualizationHook',
    'mmseg': 'SegVisualizationHook',
}
_DUMPERS = {'mmdet': 'DumpDetResults', 'mmseg': 'linvis.DumpSegResults'}


def train(args: argparse.Namespace) -> None:
    """Trains the model of a config.

    Args:
        args: Result of `linvis.cli.train_parser()`.

    Raises:
        LaunchError: If the command line, config or machine cannot train.
    """
    cfg, placement = _prepare(args, 'train')
    if args.amp:
        configs.enable_amp(cfg)
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and placement.device == 'cpu':
        wish = '--amp' if args.amp else f'AmpOptimWrapper in {args.config}'
        raise LaunchError(
            f'{wish} needs a GPU, and this run is on the CPU: leave mixed precision out.'
        )
    if args.auto_scale_lr:
        configs.enable_lr_scaling(cfg, args.config)
    _resume(cfg, args.resume)
    if cfg.get('load_from') and not cfg.get('resume'):
        _check_checkpoint(cfg.load_from)
        configs.require_matching_checkpoint(cfg, cfg.load_from, 'start')
    configs.make_resumable(cfg)
    _check_data(cfg, 'train', 'val')
    _start(cfg, placement).train()


def test(args: argparse.Namespace) -> None:
    """Tests a checkpoint of a config's model, or the weights that training starts from.

    Args:
        args: Result of `linvis.cli.test_parser()`.

    Raises:
        LaunchError: If the command line, config or machine cannot test, or if the checkpoint is
            one of another model.
    """
    cfg, placement = _prepare(args, 'test')
    untrained = args.checkpoint == 'none'
    if not untrained:
        _check_checkpoint(args.checkpoint)
        cfg.load_from = args.checkpoint
        configs.require_matching_checkpoint(cfg, args.checkpoint, 'test')
    if args.show_dir is not None:
        _draw_into(cfg, args.show_dir)
    out = Path(args.out) if args.out is not None else None
    if out is not None:
        if out.suffix not in ('.pkl', '.pickle', '.json'):
            raise LaunchError(
                f'--out {args.out}: expected .pkl for predictions or .json for metrics.'
            )
        out_file(args.out, make_folder=True)
        if out.suffix != '.json':
            _add_dumper(cfg, out)
    _check_data(cfg, 'test')
    runner = _start(cfg, placement)
    if untrained:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.init_weights()
    metrics = runner.test()
    if out is not None and out.suffix == '.json' and is_main_process():
        dump(metrics, str(out), indent=2)


def close_process_group() -> None:
    """Leaves the job's processes, if they were connected."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _prepare(args: argparse.Namespace, kind: str) -> tuple[Config, Placement]:
    """Reads the config and finds the device."""
    compat.install()
    register_safe_loader()
    cfg = configs.load_config(args.config, args.cfg_options)
    configs.require(cfg, kind, args.config)
    configs.set_work_dir(cfg, args.work_dir, args.config)
    cfg.launcher = args.launcher
    placement = resolve_placement(args.device, args.launcher)
    return cfg, placement


def _start(cfg: Config, placement: Placement) -> Runner:
    """Connects the processes, reports what the run runs on and builds the runner."""
    configs.make_work_dir(cfg)
    join_processes(placement, cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800))
    if placement.rank == 0:
        text = f'{placement.device}, {placement.world_size} process(es)'
        if placement.launcher != 'none':
            text += f' of launcher {placement.launcher} over {placement.backend}'
        print_log('\n'.join(startup_lines(text)))
    return TaskRunner.from_cfg(cfg)


def _check_data(cfg: Config, *parts: str) -> None:
    """Checks the files that the dataset and the metrics of 'train', 'val' or 'test' name."""
    for part in parts:
        loader = cfg.get(f'{part}_dataloader')
        if loader is not None and isinstance(loader.get('dataset'), dict):
            check_dataset_cfg(loader.dataset)
        evaluator = cfg.get(f'{part}_evaluator')
        if isinstance(evaluator, (dict, list, tuple)):
            check_evaluator_cfg(evaluator)


def _check_checkpoint(checkpoint: str, *, resume: bool = False) -> None:
    """Reads a checkpoint once before the run writes anything, as it may be none.

    What has to be downloaded is left to the runner, whose processes agree on who does it.
    """
    if '://' in checkpoint:
        return
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise LaunchError(f'Checkpoint {checkpoint} {_why_no_checkpoint(path)}')
    content = load_checkpoint(path)
    if resume:
        check_resumable(content, checkpoint)


def _why_no_checkpoint(path: Path) -> str:
    """Says what is wrong with a path, and which checkpoints lie there."""
    folder = path if path.is_dir() else path.parent
    near = sorted(folder.glob('*.pth'), key=lambda file: file.stat().st_mtime)[-3:]
    names = ' or '.join(str(folder / file.name) for file in near)
    if path.is_dir():
        return f'is a folder: name a file in it{", such as " + names if near else ""}.'
    return f'does not exist: {"did you mean " + names + "?" if near else "check the path."}'


def _resume(cfg: Config, resume: str | None) -> None:
    """Finds the checkpoint to go on from."""
    if resume is None and not cfg.get('resume'):
        return
    named = resume if resume not in (None, 'auto') else None
    if resume is None:
        named = cfg.get('load_from')
    path = named or _latest_checkpoint(cfg.work_dir)
    if path is None:
        print_log(f'Nothing to resume in {cfg.work_dir}: starting a new run.')
        cfg.resume = False
        return
    _check_checkpoint(path, resume=True)
    cfg.resume = True
    cfg.load_from = path
    configs.require_matching_checkpoint(cfg, path, 'resume')


def _latest_checkpoint(work_dir: str) -> str | None:
    """Returns the checkpoint that the last run names, also after its folder was moved."""
    if not (Path(work_dir) / 'last_checkpoint').is_file():
        return None
    path = Path(find_latest_checkpoint(work_dir))
    moved = Path(work_dir) / path.name
    return str(moved if not path.is_file() and moved.is_file() else path)


def _draw_into(cfg: Config, folder: str) -> None:
    """Has the task's hook draw predictions into a folder."""
    path = str(Path(folder).resolve())
    scope = cfg.get('default_scope')
    if scope not in _VISUALIZATION_HOOKS:
        raise LaunchError(
            f'--show-dir knows mmpretrain, mmdet and mmseg, got default_scope {scope}.'
        )
    hooks = cfg.setdefault('default_hooks', {})
    hook: dict[str, Any] = hooks.get('visualization') or {'type': _VISUALIZATION_HOOKS[scope]}
    if scope == 'mmpretrain':
        hook = {'type': _VISUALIZATION_HOOKS[scope], 'out_dir': path}
    elif scope == 'mmdet':
        hook.update(draw=True, test_out_dir=path)
    else:
        hook.update(draw=True)
        cfg.visualizer.save_dir = path
    hooks['visualization'] = hook


def _add_dumper(cfg: Config, path: Path) -> None:
    """Adds a metric that writes the predictions."""
    kind = _DUMPERS.get(cfg.get('default_scope'), 'DumpResults')
    evaluator = cfg.test_evaluator
    metrics = evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]
    cfg.test_evaluator = [*metrics, {'type': kind, 'out_file_path': str(path)}]
