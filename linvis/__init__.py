"""linvis: linear-complexity vision backbones for OpenMMLab."""

from linvis._version import __version__

__all__ = ['__version__']
