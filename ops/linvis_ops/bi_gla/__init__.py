from linvis_ops.bi_gla.interface import bi_gla

__all__ = ['bi_gla']
