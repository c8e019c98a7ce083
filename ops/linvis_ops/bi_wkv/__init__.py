from linvis_ops.bi_wkv.interface import bi_wkv

__all__ = ['bi_wkv']
