from linvis.models.backbones import VRWKV, TokenBackbone
from linvis.models.necks import SimpleFeaturePyramid

__all__ = ['VRWKV', 'SimpleFeaturePyramid', 'TokenBackbone']
