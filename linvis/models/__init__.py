from linvis.models.backbones import VRWKV, Backbone, TokenBackbone, ViG, ViGHierarchical, ViR
from linvis.models.necks import SimpleFeaturePyramid

__all__ = [
    'VRWKV',
    'Backbone',
    'SimpleFeaturePyramid',
    'TokenBackbone',
    'ViG',
    'ViGHierarchical',
    'ViR',
]
