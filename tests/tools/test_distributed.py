"""Two processes on CPUs, as a user starts them; subprocesses, therefore few tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONFIG = """
custom_imports = dict(imports=['toy'])
default_scope = 'mmengine'
model = dict(type='ToyModel', norm='SyncBN')
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type='ToyDataset'),
    sampler=dict(type='DefaultSampler', shuffle=True))
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
custom_hooks = [dict(type='RecordHook')]
env_cfg = dict(dist_cfg=dict(backend='nccl'))
randomness = dict(seed=7)
"""


@pytest.fixture
def dist_train(project, tmp_path):
    """Runs tools/dist_train.sh with two processes on the toy config."""
    (tmp_path / 'config.py').write_text(CONFIG)
    environ = {
        **os.environ,
        'PYTHON': sys.executable,
        'PYTHONPATH': str(project / 'tests' / 'engine'),
        'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '-1',
    }

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ['bash', str(project / 'tools/dist_train.sh'), 'config.py', '2', *arguments],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_two_cpu_processes_stop_together_and_go_on(dist_train, tmp_path):
    hook = [f'custom_hooks.0.{setting}' for setting in ('kill_at=4', 'number=15', 'rank=1')]
    stopped = dist_train('--work-dir', 'runs', '--cfg-options', *hook)
    assert stopped.returncode != 0
    assert '2 process(es) of launcher pytorch over gloo' in stopped.stdout
    assert '1 SyncBN layers run as BatchNorm: SyncBN needs GPUs.' in stopped.stdout
    path = tmp_path / 'runs' / 'interrupted_iter_4.pth'
    assert Path((tmp_path / 'runs' / 'last_checkpoint').read_text()) == path
    # Three batches an epoch and process: the second epoch had one.
    meta = torch.load(path, weights_only=False)['meta']
    assert (meta['epoch'], meta['iter']) == (1, 4)

    resumed = dist_train('--work-dir', 'runs', '--resume')
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert 'Going on in epoch 2 after 1 of 3 batches.' in resumed.stdout
    assert torch.load(tmp_path / 'runs/epoch_2.pth', weights_only=False)['meta']['iter'] == 6
