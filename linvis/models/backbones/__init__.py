from linvis.models.backbones.backbone import Backbone
from linvis.models.backbones.token_backbone import TokenBackbone
from linvis.models.backbones.vig import ViG
from linvis.models.backbones.vig_hierarchical import ViGHierarchical
from linvis.models.backbones.vir import ViR
from linvis.models.backbones.vrwkv import VRWKV

__all__ = ['VRWKV', 'Backbone', 'TokenBackbone', 'ViG', 'ViGHierarchical', 'ViR']
