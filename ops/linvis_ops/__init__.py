"""Fused bidirectional operators for linear-complexity vision backbones.

Depends on torch alone; Triton is used where it is there. See README.md of each operator's folder
for its mathematics.
"""

from linvis_ops._dispatch import (
    BackendUnavailableError,
    available_backends,
    default_backend,
    operators,
)
from linvis_ops.bi_gla import bi_gla
from linvis_ops.bi_wkv import bi_wkv
from linvis_ops.layer_norm import layer_norm
from linvis_ops.ms_deform_attn import ms_deform_attn
from linvis_ops.q_shift import q_shift
from linvis_ops.q_shift_mix import q_shift_mix
from linvis_ops.retention import retention, retention_with_state

__all__ = [
    'BackendUnavailableError',
    'available_backends',
    'bi_gla',
    'bi_wkv',
    'default_backend',
    'layer_norm',
    'ms_deform_attn',
    'operators',
    'q_shift',
    'q_shift_mix',
    'retention',
    'retention_with_state',
]
