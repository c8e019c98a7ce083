"""Stand-in for `mmcv._ext`, the compiled operators of mmcv."""

import importlib
import sys
from types import ModuleType
from typing import Literal

from linvis.compat import attention, boxes, focal, roi
from linvis.compat.imports import StandInModule

_NAME = 'mmcv._ext'


def install_mmcv_ext() -> Literal['compiled', 'stand-in']:
    """Make `mmcv._ext` importable; a compiled one is left in place.

    Returns:
        Which of the two serves now.

    Raises:
        ModuleNotFoundError: If mmcv is not installed.
        ImportError: If compiled operators are installed and do not load.
    """
    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name == _NAME:
            module = _stand_in()
            sys.modules[_NAME] = module
            sys.modules['mmcv']._ext = module  # type: ignore[attr-defined]
        elif error.name == 'mmcv':
            raise ModuleNotFoundError(
                'mmcv is not installed: run `pip install --no-deps -r requirements/mm.txt`.',
                name='mmcv',
            ) from error
        else:
            raise
    except ImportError as error:
        raise ImportError(
            f'the compiled operators of mmcv do not load ({error}): build mmcv for this PyTorch or '
            'reinstall it with `pip install --no-deps -r requirements/mm.txt` to do without them.'
        ) from error
    return 'stand-in' if isinstance(module, StandInModule) else 'compiled'


def _stand_in() -> ModuleType:
    return StandInModule(
        _NAME,
        'Operators of mmcv without compilation, by linvis.compat.',
        provided={
            'nms': boxes.nms,
            'softnms': boxes.softnms,
            'nms_match': boxes.nms_match,
            'roi_align_forward': roi.roi_align_forward,
            'roi_align_backward': roi.roi_align_backward,
            'sigmoid_focal_loss_forward': focal.sigmoid_focal_loss_forward,
            'sigmoid_focal_loss_backward': focal.sigmoid_focal_loss_backward,
            'softmax_focal_loss_forward': focal.softmax_focal_loss_forward,
            'softmax_focal_loss_backward': focal.softmax_focal_loss_backward,
            'ms_deform_attn_forward': attention.ms_deform_attn_forward,
            'ms_deform_attn_backward': attention.ms_deform_attn_backward,
            'get_compiler_version': lambda: 'not compiled',
            'get_compiling_cuda_version': lambda: 'not available',
        },
        missing=_no_stand_in,
    )


def _no_stand_in(operator: str) -> NotImplementedError:
    return NotImplementedError(
        f'the mmcv operator {operator} has no stand-in: install mmcv with its compiled operators '
        '(mmcv._ext) to use it.'
    )
