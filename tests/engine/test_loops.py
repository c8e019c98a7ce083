import pytest
from mmengine.logging import MessageHub
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from linvis.engine.loops import PROGRESS_KEY, ResumableEpochTrainLoop


class Runner:
    """What the loop uses of a runner; notes what ran."""

    def __init__(self) -> None:
        self.message_hub = MessageHub('loop_test')
        self.model = self
        self.calls: list = []
        self.visualizer = self
        self.val_loop = None

    def train(self) -> None:
        self.calls.append('train')

    def call_hook(self, name: str, **kwargs) -> None:
        if name in ('before_train_epoch', 'after_train_epoch'):
            self.calls.append(name)

    def train_step(self, data_batch, optim_wrapper):
        self.calls.append(data_batch.tolist())

    optim_wrapper = None


def make_loop(batch_size: int, progress: list[int] | None, epoch: int = 2):
    runner = Runner()
    sampler = BatchSampler(SequentialSampler(range(8)), batch_size, drop_last=False)
    loop = ResumableEpochTrainLoop(
        runner, DataLoader(list(range(8)), batch_sampler=sampler), max_epochs=3
    )
    loop._epoch = epoch
    if progress is not None:
        runner.message_hub.update_info(PROGRESS_KEY, progress)
    return loop, runner


def test_done_batches_are_skipped_and_hooks_run_once():
    loop, runner = make_loop(2, [2, 3, 4])
    loop.run_epoch()
    assert runner.calls == ['before_train_epoch', 'train', [6, 7], 'after_train_epoch']
    assert loop.epoch == 3


def test_next_epoch_is_whole_again():
    loop, runner = make_loop(2, [2, 3, 4])
    loop.run_epoch()
    runner.calls.clear()
    loop.run_epoch()
    assert sum(isinstance(call, list) for call in runner.calls) == 4


def test_epoch_with_all_batches_done_only_ends():
    loop, runner = make_loop(2, [2, 4, 4])
    loop.run_epoch()
    assert runner.calls == ['before_train_epoch', 'train', 'after_train_epoch']


def test_same_share_is_skipped_with_another_batch_size():
    loop, runner = make_loop(1, [2, 2, 4])
    loop.run_epoch()
    assert [call for call in runner.calls if isinstance(call, list)] == [[4], [5], [6], [7]]


@pytest.mark.parametrize('progress', [None, [1, 3, 4]], ids=['none', 'of-another-epoch'])
def test_epoch_without_progress_is_whole(progress):
    loop, runner = make_loop(2, progress)
    loop.run_epoch()
    assert sum(isinstance(call, list) for call in runner.calls) == 4
