"""Data: guarded loading, a colour transform, checks of configs and of prepared folders."""

from linvis.datasets.checks import DatasetError, check_dataset_cfg, check_evaluator_cfg
from linvis.datasets.color_jitter import ColorJitter
from linvis.datasets.load_guard import LoadGuard, UnreadableDataError

__all__ = [
    'ColorJitter',
    'DatasetError',
    'LoadGuard',
    'UnreadableDataError',
    'check_dataset_cfg',
    'check_evaluator_cfg',
]
