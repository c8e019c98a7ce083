"""mmengine's runner with the two things it gets wrong on CPUs and on resuming."""

from typing import Any

from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm


class TaskRunner(Runner):
    """Runner for one GPU, many GPUs, one CPU process or several of them.

    Differences from mmengine's runner:

    * Several CPU processes work: parameters are synchronised without device ids, and SyncBN, which
      exists on GPUs only, runs as BatchNorm.
    * A resumed run draws its samples in the order of the run that it continues; mmengine restores
      the seed after the sampler has taken another one.
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
