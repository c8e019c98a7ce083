from linvis.models.backbones import (
    VRWKV,
    Backbone,
    HybridViR,
    TokenBackbone,
    ViG,
    ViGHierarchical,
    ViR,
)
from linvis.models.necks import SimpleFeaturePyramid

__all__ = [
    'VRWKV',
    'Backbone',
    'HybridViR',
    'SimpleFeaturePyramid',
    'TokenBackbone',
    'ViG',
    'ViGHierarchical',
    'ViR',
]
