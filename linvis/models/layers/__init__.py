from linvis.models.layers.block import MixerBlock
from linvis.models.layers.channel_mix import ChannelMix
from linvis.models.layers.conv_block import ConvBlock
from linvis.models.layers.featmap import to_featmap, to_tokens
from linvis.models.layers.gated_linear_attention import GatedLinearAttention
from linvis.models.layers.layer_scale import LayerScale
from linvis.models.layers.norm import LayerNorm, LayerNorm2d, RMSNorm
from linvis.models.layers.patch_embed import ConvPatchEmbed, PatchEmbed, conv_stem
from linvis.models.layers.position import resize_position_embedding
from linvis.models.layers.pre_norm_block import PreNormBlock
from linvis.models.layers.retention import Retention
from linvis.models.layers.spatial_mix import SpatialMix
from linvis.models.layers.swiglu import SwiGLU

__all__ = [
    'ChannelMix',
    'ConvBlock',
    'ConvPatchEmbed',
    'GatedLinearAttention',
    'LayerNorm',
    'LayerNorm2d',
    'LayerScale',
    'MixerBlock',
    'PatchEmbed',
    'PreNormBlock',
    'RMSNorm',
    'Retention',
    'SpatialMix',
    'SwiGLU',
    'conv_stem',
    'resize_position_embedding',
    'to_featmap',
    'to_tokens',
]
