"""Which exceptions are a user's mistake, and the one sentence that says so."""

import difflib
import dis
import importlib.util
import inspect
import re
import traceback
from pathlib import Path
from types import TracebackType

import torch

_RAISE = dis.opmap['RAISE_VARARGS']
_WORKER_MARK = 'in DataLoader worker process'
_NO_HOST_MEMORY = "can't allocate memory"
# What takes less memory, by the task: anywhere, and on a GPU.
_LESS_MEMORY = {
    'train': (
        'lower train_dataloader.batch_size (in validation that of val_dataloader)',
        'or train with model.backbone.with_cp=True',
    ),
    'test': ('lower test_dataloader.batch_size', 'or take a smaller model'),
    'stream': ('take lower bands with --band', 'or a smaller model'),
}
_LIBRARIES = frozenset(('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg'))
_WRONG_ARGUMENT = re.compile(r'unexpected keyword argument|__init__\(\) missing \d+ required')


class LaunchError(ValueError):
    """A command line, config or environment that cannot run; the message is one sentence."""


def user_sentence(error: BaseException, task: str = 'train') -> str | None:
    """Says in one line what a user can mend, or nothing if the error is a bug.

    A mistake of the user is: an exception that linvis or linvis_ops raises on purpose (a `raise`
    statement), also in a process of the data loader, a name that is in no registry, an argument
    that a class does not have or that is missing, a value that a model of a library is not built
    with, a class beyond those of the head, and no memory left on the GPU or the machine.

    Args:
        error: The exception with its traceback.
        task: 'train', 'test' or 'stream': what runs, by which the remedies differ.

    Returns:
        One sentence without line breaks, or None.
    """
    text = _message(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f'The GPU has no memory left: {", ".join(_LESS_MEMORY[task])} '
            f'({text.split(". ")[1] if ". " in text else text}).'
        )
    if isinstance(error, RuntimeError) and _NO_HOST_MEMORY in text:
        return (
            f'The machine has no memory left: {_LESS_MEMORY[task][0]}, or take a smaller model '
            f'({text.partition(_NO_HOST_MEMORY)[2].split(". ")[0].lstrip(": ")}).'
        )
    if isinstance(error, KeyError) and 'is not in the' in text and 'registry' in text:
        name = text.split(' is not in the', 1)[0]
        registry = text.split(' is not in the ', 1)[1].split(' registry', 1)[0]
        return f'{name} is not a known {registry.rpartition("::")[2]}: check `type` in the config.'
    if isinstance(error, TypeError) and _WRONG_ARGUMENT.search(text):
        if not _raised_while_building(error):
            return None
        return f'{text}{_near_argument(error, text)}: check the config.'
    built = _model_of_library(error)
    if built is not None:
        reason = f'{type(error).__name__}: {text}' if text else type(error).__name__
        return f'{built} cannot be built ({reason}): check the config.'
    if text.startswith(('Class Index must be less than', 'Class values must be smaller than')):
        return (
            'A label is not below model.head.num_classes: set that to the number of classes, which '
            'is the number of folders in the training set.'
        )
    if isinstance(error, (ValueError, TypeError, FileNotFoundError, RuntimeError, ImportError)):
        return text if isinstance(error, LaunchError) or _raised_by_linvis(error) else None
    return None


def _message(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    text = str(text)
    if _thrown_in_worker(text):
        text = text.rstrip().rpartition('\n')[2].partition(': ')[2]
    return ' '.join(text.split())


def _thrown_in_worker(text: str) -> bool:
    """Whether a text is the traceback of an exception of ours out of a loader's process."""
    return _WORKER_MARK in text and text.rstrip().rpartition('\n')[2].startswith('linvis.')


def _last_frame(error: BaseException) -> TracebackType | None:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame


def _raised_by_linvis(error: BaseException) -> bool:
    """Whether a raise statement of our packages threw the error, on purpose therefore."""
    if _thrown_in_worker(str(error)):
        return True
    frame = _last_frame(error)
    if frame is None:
        return False
    name = frame.tb_frame.f_globals.get('__name__', '')
    if name.partition('.')[0] not in ('linvis', 'linvis_ops'):
        return False
    # The instruction, not the line, that threw: sources may be elsewhere, and a line may hold more.
    return frame.tb_frame.f_code.co_code[frame.tb_lasti] == _RAISE


def _raised_while_building(error: BaseException) -> bool:
    """Whether mmengine called a class with arguments out of a config."""
    spec = importlib.util.find_spec('mmengine')
    if spec is None or spec.origin is None:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(spec.origin).parent)


def _model_of_library(error: BaseException) -> str | None:
    """The class of a library whose constructor threw an error at the values of a config."""
    if not isinstance(error, (TypeError, ValueError, AssertionError, LookupError)):
        return None
    called = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get('__name__', '')
        if name == 'mmengine.registry.build_functions' and 'obj_cls' in frame.f_locals:
            registry = frame.f_locals['registry']
            called = frame.f_locals['obj_cls'] if registry.name == 'model' else None
        elif name.partition('.')[0] in ('linvis', 'linvis_ops'):
            called = None  # what we build ourselves
    if called is None or called.__module__.partition('.')[0] not in _LIBRARIES:
        return None
    return called.__name__


def _near_argument(error: BaseException, text: str) -> str:
    """The argument that an unknown one may stand for, of the class that mmengine called."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'$", text)  # without Python's own hint
    frame = _last_frame(error)
    called = frame.tb_frame.f_locals.get('obj_cls') if frame is not None else None
    if unknown is None or called is None:
        return ''
    try:
        names = list(inspect.signature(called).parameters)
    except (TypeError, ValueError):  # not of Python
        return ''
    near = difflib.get_close_matches(unknown[1], names, n=1)
    return f' (did you mean {near[0]}?)' if near else ''
