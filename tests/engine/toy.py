"""A model and a dataset small enough for tests of engine code; configs import this module."""

import multiprocessing
import os
import subprocess

import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import nn

SEQUENCES: dict[str, list] = {}


@DATASETS.register_module(force=True)
class ToyDataset(BaseDataset):
    def load_data_list(self) -> list[dict]:
        generator = torch.Generator().manual_seed(3)
        rows = torch.randn(24, 4, generator=generator)
        return [{'inputs': row, 'target': row.sum()} for row in rows]


@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    def __init__(self, width: int = 4, data_preprocessor=None, norm: str = 'BN') -> None:
        super().__init__(data_preprocessor)
        self.backbone = nn.Linear(width, 8)
        self.norm = {'BN': nn.BatchNorm1d, 'SyncBN': nn.SyncBatchNorm}[norm](8)
        self.head = nn.Linear(8, 1)

    def forward(self, inputs, target=None, mode='tensor', **_):
        x = torch.stack(list(inputs)) if not torch.is_tensor(inputs) else inputs
        y = self.head(self.norm(self.backbone(x))).squeeze(1)
        if mode == 'loss':
            return {'loss': (y - torch.stack(list(target))).square().mean()}
        return [{'prediction': value} for value in y]


@METRICS.register_module(force=True)
class ToyMetric(BaseMetric):
    def __init__(self, ann_file=None):
        super().__init__()

    def process(self, data_batch, data_samples) -> None:
        self.results += [float(sample['prediction']) for sample in data_samples]

    def compute_metrics(self, results: list) -> dict:
        return {'mean': sum(results) / len(results)}


@HOOKS.register_module(force=True)
class RecordHook(Hook):
    """Notes iteration, learning rate and loss, and sends a signal after an iteration."""

    priority = 'VERY_HIGH'

    def __init__(
        self,
        name: str = 'run',
        kill_at: int = -1,
        number: int = 2,
        val: bool = False,
        rank: int = 0,
    ) -> None:
        self.entries = SEQUENCES.setdefault(name, [])
        self.kill_at, self.number, self.val, self.rank = kill_at, number, val, rank

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.val and batch_idx == 0:
            self.entries.append(('val', runner.iter))
            if runner.iter == self.kill_at:
                self._send()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        loss = float(outputs['loss'])
        lr = runner.optim_wrapper.get_lr()['lr'][0]
        self.entries.append((runner.epoch, batch_idx, runner.iter, lr, loss))
        if not self.val and runner.iter + 1 == self.kill_at:
            self._send()

    def _send(self) -> None:
        """Signals the whole group, as a terminal and Slurm do: the loader's processes, too."""
        if get_rank() == self.rank:
            for child in multiprocessing.active_children():
                # Not by os.kill: a loader's process leaves in silence when its parent asks for it.
                subprocess.run(['kill', f'-{self.number}', str(child.pid)], check=True)
                child.join(0.3)  # one that does not survive is noticed here
            os.kill(os.getpid(), self.number)
