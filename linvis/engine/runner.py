"""mmengine's runner with what it gets wrong on CPUs, on resuming and on compiling."""

from typing import Any

from mmengine.device import get_device
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm

from linvis.engine.errors import LaunchError


class TaskRunner(Runner):
    """Runner for one GPU, many GPUs, one CPU process or several of them.

    Differences from mmengine's runner:

    * Several CPU processes work: parameters are synchronised without device ids, and SyncBN, which
      exists on GPUs only, runs as BatchNorm.
    * A resumed run draws its samples in the order of the run that it continues; mmengine restores
      the seed after the sampler has taken another one.
    * `compile` in a config (True, or options of torch.compile) compiles the backbone; mmengine
      compiles the training step with the optimizer, which PyTorch cannot trace where a config sets
      `paramwise_cfg`.
    """

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Moves the model to its device and wraps it for distributed training."""
        count = sum(_is_sync_bn(module) for module in model.modules())
        on_cpu = get_device() == 'cpu'
        if count and (on_cpu or not self.distributed):
            reason = 'SyncBN needs GPUs' if self.distributed else 'there is one process'
            self.logger.info('%d SyncBN layers run as BatchNorm: %s.', count, reason)
        if self.distributed and on_cpu:
            model = revert_sync_batchnorm(model)
            unused = self.cfg.get('find_unused_parameters', False)
            model_wrapper_cfg = {
                'type': 'MMDistributedDataParallel',
                'broadcast_buffers': False,
                'find_unused_parameters': unused,
                **(model_wrapper_cfg or {}),
                'device_ids': None,
            }
        return super().wrap_model(model_wrapper_cfg, model)

    def _maybe_compile(self, target: str) -> None:  # noqa: ARG002
        """Compiles the backbone in place if the config asks for it; names of parameters stay.

        Raises:
            LaunchError: If `compile` is neither a bool nor a dict, or there is no backbone.
        """
        options = self.cfg.get('compile')
        if options is None or options is False:
            return
        if options is True:
            options = {}
        if not isinstance(options, dict):
            raise LaunchError(
                'compile must be True, False or a dict of options of torch.compile, '
                f'got {options!r}.'
            )
        model = self.model.module if is_model_wrapper(self.model) else self.model
        backbone = getattr(model, 'backbone', None)
        if backbone is None:
            raise LaunchError(f'compile needs a model with a backbone, and {type(model)} has none.')
        backbone.compile(**{'fullgraph': True, **options})
        self.logger.info('The backbone is compiled at its first call, which takes a while.')

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resumes model, optimizer, schedules and the order of the samples."""
        super().resume(filename, *args, **kwargs)
        if self._randomness_cfg.get('diff_rank_seed', False):
            return
        sampler = self.train_dataloader.sampler
        if not hasattr(sampler, 'seed'):
            sampler = getattr(self.train_dataloader.batch_sampler, 'sampler', None)
        if hasattr(sampler, 'seed'):
            sampler.seed = self.seed


def _is_sync_bn(module: nn.Module) -> bool:
    return isinstance(module, SyncBatchNorm) or type(module).__name__ == 'SyncBatchNorm'
