"""Refusing a checkpoint of another model."""

import re
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from linvis.engine.errors import LaunchError
from linvis.registry import HOOKS
from linvis.utils.checkpoint import CheckpointError, check_fits

_NEEDED_TO_RESUME = ('meta', 'message_hub', 'optimizer')


@HOOKS.register_module()
class CheckpointMatchHook(Hook):
    """Compares a checkpoint with the model before the weights are copied.

    mmengine copies what fits, logs the rest and goes on, so that a checkpoint of another model
    gives a random network without an error.

    Args:
        path: Name of the checkpoint, for messages.
        resume: Whether the checkpoint must hold the state of a training run, too.
    """

    def __init__(self, path: str = 'the checkpoint', resume: bool = False) -> None:
        self.path = path
        self.resume = resume

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares the weights.

        Raises:
            LaunchError: If weights of the model are missing or have another shape, or if the
                state of the training run is missing.
        """
        if self.resume:
            absent = [key for key in _NEEDED_TO_RESUME if key not in checkpoint]
            if absent:
                raise LaunchError(
                    f'{self.path} cannot be resumed, as it lacks {", ".join(absent)}: to start '
                    f'from its weights use --cfg-options load_from={self.path} without --resume.'
                )
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights = checkpoint.get('state_dict', checkpoint)
        given = {re.sub(r'^module\.', '', key): value for key, value in weights.items()}
        check_weights(model, given, self.path)
        extra = [key for key in given if key not in model.state_dict()]
        if extra:
            runner.logger.warning(
                '%s holds %d weights that the model does not have, such as %s; they are left out.',
                self.path,
                len(extra),
                extra[0],
            )


def check_weights(model: nn.Module, given: Mapping[str, Any], path: str) -> None:
    """Checks that every weight of a model is given in its shape.

    Position embeddings of another resolution pass, as loading resamples them; counters of
    BatchNorm may be missing, as nothing depends on them.

    Raises:
        LaunchError: With one sentence that names the checkpoint and an example.
    """
    try:
        check_fits(model, given)
    except CheckpointError as error:
        raise LaunchError(f'{path}: {error}') from error
    wanted = [key for key in model.state_dict() if not key.endswith('num_batches_tracked')]
    missing = [key for key in wanted if key not in given]
    if missing:
        raise LaunchError(
            f'{path} does not fit the model: {len(missing)} of {len(wanted)} weights are missing, '
            f'such as {missing[0]}; use the config it was trained with.'
        )
