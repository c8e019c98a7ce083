from linvis_ops.q_shift.interface import q_shift

__all__ = ['q_shift']
