from linvis_ops.ms_deform_attn.interface import ms_deform_attn

__all__ = ['ms_deform_attn']
