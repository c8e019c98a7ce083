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

PURPOSES = ('test', 'resume', 'start')
_NEEDED_TO_RESUME = ('meta', 'message_hub', 'optimizer')


@HOOKS.register_module()
class CheckpointMatchHook(Hook):
    """Compares a checkpoint with the model before the weights are copied.

    mmengine copies what fits, logs the rest and goes on, so that a checkpoint of another model
    gives a random network without an error.

    Args:
        path: Name of the checkpoint, for messages.
        purpose: 'test' and 'resume' need every weight of the model, and 'resume' the state of the
            training run, too; 'start' needs the backbone alone, as a new head starts at random.

    Raises:
        ValueError: If purpose is none of these.
    """

    def __init__(self, path: str = 'the checkpoint', purpose: str = 'test') -> None:
        if purpose not in PURPOSES:
            raise ValueError(f'purpose must be one of {", ".join(PURPOSES)}, got {purpose!r}.')
        self.path = path
        self.purpose = purpose

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares the weights.

        Raises:
            LaunchError: If weights of the model are missing, have another shape or are of more
                layers, or if the state of the training run is missing.
        """
        if self.purpose == 'resume':
            check_resumable(checkpoint, self.path)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights = checkpoint.get('state_dict', checkpoint)
        given = {re.sub(r'^module\.', '', key): value for key, value in weights.items()}
        if self.purpose == 'start':
            check_backbone(model, given, self.path)
            return  # mmengine warns about the weights outside of the backbone that do not fit
        check_weights(model, given, self.path)
        extra = [key for key in given if key not in model.state_dict()]
        if extra:
            runner.logger.warning(
                '%s holds %d weights that the model does not have, such as %s; they are left out.',
                self.path,
                len(extra),
                extra[0],
            )


def check_resumable(checkpoint: Mapping[str, Any], path: str) -> None:
    """Checks that a checkpoint holds the state of a training run.

    Raises:
        LaunchError: With one sentence that names the checkpoint and what it lacks.
    """
    absent = [key for key in _NEEDED_TO_RESUME if key not in checkpoint]
    if absent:
        raise LaunchError(
            f'{path} cannot be resumed, as it lacks {", ".join(absent)}: to start from its '
            f'weights use --cfg-options load_from={path} without --resume.'
        )


def check_backbone(model: nn.Module, given: Mapping[str, Any], path: str) -> None:
    """Checks that weights are those of a model's backbone, or of the model if it has none.

    Raises:
        LaunchError: With one sentence that names the checkpoint and examples.
    """
    backbone = getattr(model, 'backbone', None)
    try:
        if isinstance(backbone, nn.Module):
            check_fits(backbone, given, 'backbone.')
        else:
            check_fits(model, given)
    except CheckpointError as error:
        raise LaunchError(f'{path}: {error}') from error


def check_weights(model: nn.Module, given: Mapping[str, Any], path: str) -> None:
    """Checks that every weight of a model is given in its shape, and no more of its parts.

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
