from linvis_ops.q_shift_mix.interface import q_shift_mix

__all__ = ['q_shift_mix']
