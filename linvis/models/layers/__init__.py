from linvis.models.layers.block import MixerBlock
from linvis.models.layers.channel_mix import ChannelMix
from linvis.models.layers.patch_embed import PatchEmbed
from linvis.models.layers.position import resize_position_embedding
from linvis.models.layers.spatial_mix import SpatialMix

__all__ = [
    'ChannelMix',
    'MixerBlock',
    'PatchEmbed',
    'SpatialMix',
    'resize_position_embedding',
]
