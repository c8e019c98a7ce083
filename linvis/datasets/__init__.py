"""Data: loading that survives unreadable files, checks of configs and of prepared folders."""

from linvis.datasets.checks import DatasetError, check_dataset_cfg, check_evaluator_cfg
from linvis.datasets.load_guard import LoadGuard, UnreadableDataError

__all__ = [
    'DatasetError',
    'LoadGuard',
    'UnreadableDataError',
    'check_dataset_cfg',
    'check_evaluator_cfg',
]
