from linvis.models.backbones.token_backbone import TokenBackbone
from linvis.models.backbones.vrwkv import VRWKV

__all__ = ['VRWKV', 'TokenBackbone']
