from linvis_ops.layer_norm.interface import layer_norm

__all__ = ['layer_norm']
