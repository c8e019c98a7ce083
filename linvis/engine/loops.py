"""Epoch loop that goes on where an interrupted epoch stopped."""

import itertools
from collections.abc import Iterator

from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader, Sampler

from linvis.registry import LOOPS

PROGRESS_KEY = 'interrupted_epoch_progress'


class _TailBatchSampler(Sampler[list[int]]):
    """The batches of a batch sampler after the first `skip` ones."""

    def __init__(self, batch_sampler: Sampler[list[int]], skip: int, total: int) -> None:
        self.batch_sampler = batch_sampler
        self.skip = skip
        self.total = total

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self.batch_sampler), self.skip, None)

    def __len__(self) -> int:
        return self.total - self.skip


@LOOPS.register_module()
class ResumableEpochTrainLoop(EpochBasedTrainLoop):
    """EpochBasedTrainLoop that resumes within an epoch.

    mmengine starts the interrupted epoch afresh, which adds iterations and shifts schedules that
    count them. This loop reads how many batches of the epoch were done from the checkpoint that
    InterruptCheckpointHook wrote and lets the sampler skip their indices; nothing is loaded for
    them. Checkpoints written at the end of an epoch resume as in mmengine.

    If the number of batches an epoch has changed (another batch size or number of processes), the
    same share of the epoch is skipped.
    """

    def run_epoch(self) -> None:
        """Runs one epoch, or what is left of the interrupted one."""
        done = self._take_progress()
        if done == 0:
            super().run_epoch()
            return
        total = len(self.dataloader)
        print_log(
            f'Going on in epoch {self._epoch + 1} after {done} of {total} batches.',
            logger='current',
        )
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        if done < total:
            for index, data_batch in enumerate(self._rest_of_epoch(done), start=done):
                self.run_iter(index, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _take_progress(self) -> int:
        """Returns the number of batches to skip, once."""
        hub = self.runner.message_hub
        progress = hub.runtime_info.get(PROGRESS_KEY)
        if progress is None:
            return 0
        hub.pop_info(PROGRESS_KEY)
        epoch, done, total = progress
        if epoch != self._epoch:
            return 0
        return done * len(self.dataloader) // total

    def _rest_of_epoch(self, done: int) -> DataLoader:
        """Builds a loader of the batches after the first `done` ones."""
        loader = self.dataloader
        sampler = _TailBatchSampler(loader.batch_sampler, done, len(loader))
        return DataLoader(
            loader.dataset,
            batch_sampler=sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
        )
