"""Fixtures of engine tests: a toy config that trains in a second."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from linvis import cli

_NUMBERS = itertools.count()

CONFIG = """
custom_imports = dict(imports=['toy'])
default_scope = 'mmengine'
model = dict(type='ToyModel')
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type='ToyDataset'),
    sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type='ToyDataset'),
    sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type='ToyMetric')
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=3)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=5),
    dict(type='MultiStepLR', by_epoch=True, milestones=[1, 2], gamma=0.5)]
custom_hooks = [dict(type='RecordHook')]
default_hooks = dict(logger=dict(type='LoggerHook', interval=2))
"""


@pytest.fixture(autouse=True)
def toy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder with config.py; toy.py can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / 'config.py').write_text(CONFIG)
    yield tmp_path
    if 'toy' in sys.modules:
        sys.modules['toy'].SEQUENCES.clear()


def unique_name() -> list[str]:
    """An option: mmengine keeps visualizers and loggers of a process by name and second."""
    return ['--cfg-options', f'experiment_name=test{next(_NUMBERS)}']


@pytest.fixture
def run_train(toy_folder: Path) -> Callable[..., int]:
    """Runs the training command on the toy config and returns the exit status."""

    def run(*arguments: str, config: str = 'config.py') -> int:
        try:
            return cli.main_train([config, *arguments, *unique_name()])
        except SystemExit as stop:
            return stop.code

    return run


@pytest.fixture
def run_test(toy_folder: Path) -> Callable[..., int]:
    """Runs the test command on the toy config and returns the exit status."""

    def run(checkpoint: str, *arguments: str, config: str = 'config.py') -> int:
        return cli.main_test([config, checkpoint, *arguments, *unique_name()])

    return run
