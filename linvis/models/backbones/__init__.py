from linvis.models.backbones.backbone import Backbone
from linvis.models.backbones.token_backbone import TokenBackbone
from linvis.models.backbones.vig import ViG
from linvis.models.backbones.vig_hierarchical import ViGHierarchical
from linvis.models.backbones.vir import ViR
from linvis.models.backbones.vir_hybrid import HybridViR
from linvis.models.backbones.vrwkv import VRWKV

__all__ = ['VRWKV', 'Backbone', 'HybridViR', 'TokenBackbone', 'ViG', 'ViGHierarchical', 'ViR']
