"""Training and testing: loops, hooks, parameter groups, and what the command lines share."""

from linvis.engine.checkpoint_match import CheckpointMatchHook
from linvis.engine.drawing import ClassDrawingHook
from linvis.engine.dump import DumpSegResults
from linvis.engine.errors import LaunchError
from linvis.engine.interrupt import InterruptCheckpointHook, TrainingInterrupted
from linvis.engine.layer_decay import LayerDecayOptimWrapperConstructor
from linvis.engine.loops import ResumableEpochTrainLoop
from linvis.engine.runner import TaskRunner

__all__ = [
    'CheckpointMatchHook',
    'ClassDrawingHook',
    'DumpSegResults',
    'InterruptCheckpointHook',
    'LaunchError',
    'LayerDecayOptimWrapperConstructor',
    'ResumableEpochTrainLoop',
    'TaskRunner',
    'TrainingInterrupted',
]
