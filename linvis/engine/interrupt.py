"""Stopping a training run by a signal without losing work."""

import atexit
import os
import signal
import time
from collections.abc import Callable
from ctypes import c_bool
from functools import partial
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_rank, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from linvis.engine.loops import PROGRESS_KEY
from linvis.registry import HOOKS

PENDING_VAL_KEY = 'interrupted_validation'
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A terminal and torchrun both deliver one Ctrl-C; signals this close together count as one.
_SAME_SIGNAL_SECONDS = 1.0


class TrainingInterrupted(SystemExit):
    """Ends the process after the checkpoint is saved; the code is 128 + number of the signal."""


@HOOKS.register_module()
class InterruptCheckpointHook(Hook):
    """Saves a resumable checkpoint when the process is asked to stop.

    On SIGINT (Ctrl-C), SIGTERM (preemption, `scancel`) or SIGUSR1 (`sbatch --signal=USR1@120`)
    the running iteration is finished, gradients that are being accumulated included, then
    `interrupted_iter_N.pth` is written and named in `last_checkpoint`, so that `--resume` finds
    it. The process ends with 128 + number of the signal: 130, 143 or 138. A second signal ends it
    at once. In distributed runs all processes stop after the same iteration whichever of them got
    the signal.

    A validation that was due or running is done first thing after resuming.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._signal = 0
        self._time = 0.0
        self._previous: dict[int, Any] = {}
        self._can_stop_in_val = True

    def before_train(self, runner: Runner) -> None:
        """Listens to the signals and makes up for an interrupted validation."""
        self._signal = 0
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        _guard_workers(runner.train_dataloader)
        if runner.val_loop is not None:
            _guard_workers(runner.val_dataloader)
        if runner.message_hub.runtime_info.get(PENDING_VAL_KEY) and runner.val_loop is not None:
            runner.message_hub.pop_info(PENDING_VAL_KEY)
            runner.logger.info('Running the validation that was interrupted.')
            runner.val_loop.run()

    def after_train(self, runner: Runner) -> None:  # noqa: ARG002
        """Gives the signals back."""
        self.release()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> None:
        """Stops here if a signal came and no gradients wait to be applied."""
        number = _largest(self._signal)
        if number == 0 or not _gradients_applied(runner):
            return
        done = runner.iter + 1
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            progress = [runner.epoch, batch_idx + 1, len(runner.train_dataloader)]
            runner.message_hub.update_info(PROGRESS_KEY, progress)
        elif _validates_after(runner, done):
            runner.message_hub.update_info(PENDING_VAL_KEY, True)
        self._save_and_exit(runner, number, done)

    def before_val_epoch(self, runner: Runner) -> None:
        """Finds out whether the run can stop within this validation.

        It cannot if the processes validate different numbers of batches, as they could not agree,
        or if averaged weights stand in for the trained ones until the validation is over.
        """
        length = len(runner.val_dataloader)
        averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        self._can_stop_in_val = not averaged and _largest(length) == -_largest(-length)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,  # noqa: ARG002
        data_batch: Any = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> None:
        """Stops within a validation that belongs to a training run."""
        if self._previous and self._can_stop_in_val:
            self._stop_validation(runner)

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:  # noqa: ARG002
        """Stops after a validation within which the run could not stop."""
        if self._previous and not self._can_stop_in_val:
            number = _largest(self._signal)
            if number:
                self._save_and_exit(runner, number, runner.iter)

    def release(self) -> None:
        """Restores the handlers that were there before training."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop_validation(self, runner: Runner) -> None:
        number = _largest(self._signal)
        if number:
            runner.message_hub.update_info(PENDING_VAL_KEY, True)
            self._save_and_exit(runner, number, runner.iter)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now = time.monotonic()
        if self._signal == 0:
            self._signal, self._time = number, now
            if get_rank() == 0:
                name = signal.Signals(number).name
                # Neither print nor a logger may be entered twice, and the signal may have come
                # while one of them was writing.
                os.write(
                    2,
                    f'{name}: finishing this iteration and saving a checkpoint; a second signal '
                    'stops at once.\n'.encode(),
                )
        elif now - self._time > _SAME_SIGNAL_SECONDS:
            self.release()
            raise TrainingInterrupted(128 + number)

    def _save_and_exit(self, runner: Runner, number: int, done: int) -> None:
        path = _save(runner, done)
        barrier()
        self.release()
        runner.logger.info(
            'Stopped after iteration %d and saved %s; go on with the same command and --resume.',
            done,
            path,
        )
        runner.visualizer.close()
        raise TrainingInterrupted(128 + number)


def _largest(value: int) -> int:
    """Returns the largest value over all processes."""
    if get_world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    all_reduce(tensor, op='max')
    return int(tensor)


def _gradients_applied(runner: Runner) -> bool:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return all(item.should_update() for item in wrappers)


def _validates_after(runner: Runner, done: int) -> bool:
    loop = runner.train_loop
    return (
        runner.val_loop is not None
        and done >= loop.val_begin
        and (done % loop.val_interval == 0 or done == loop.max_iters)
    )


def _save(runner: Runner, done: int) -> Path:
    """Writes the checkpoint beside its final name first: a kill leaves the old one intact."""
    folder = Path(runner.work_dir)
    path = folder / f'interrupted_iter_{done}.pth'
    partial_file = folder / f'.{path.name}.part'
    # The call also names epoch and iteration; both are given, as a loop counts one of them late.
    meta = {'epoch': runner.epoch, 'iter': done}
    runner.save_checkpoint(str(folder), partial_file.name, meta=meta, by_epoch=False)
    if is_main_process():
        partial_file.replace(path)
        pointer = folder / '.last_checkpoint.part'
        pointer.write_text(str(path))
        pointer.replace(folder / 'last_checkpoint')
        for old in folder.glob('interrupted_iter_*.pth'):
            if old != path:
                old.unlink()
    return path


def _guard_workers(loader: DataLoader) -> None:
    """Keeps the loader's processes alive while the main process finishes its iteration.

    A terminal and Slurm signal the whole group; a worker that died would break the iteration.
    """
    init = loader.worker_init_fn
    if isinstance(init, partial) and init.func is _start_worker:
        return
    ending = RawValue(c_bool, False)
    # When Python ends, multiprocessing terminates the workers that are left and waits for them.
    # What is registered later runs earlier, so they know by then that this is not Slurm's signal.
    atexit.register(setattr, ending, 'value', True)
    loader.worker_init_fn = partial(_start_worker, ending, init)


def _start_worker(ending: Any, init: Callable[[int], None] | None, worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, partial(_ignore_once, ending))
    if init is not None:
        init(worker_id)


def _ignore_once(ending: Any, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if ending.value:
        # The main process takes a worker that a signal ended for one that failed.
        os._exit(0)
    # The next one comes from the main process, which ends workers that hang: PyTorch's handler
    # tells that sender from others, and then exits with 0.
    torch._C._set_worker_signal_handlers()
