"""Configs that inherit from mmsegmentation as 'mmseg::...'."""

import importlib.metadata

from mmengine.config import utils

_DISTRIBUTION = 'onedl-mmsegmentation'


def install_config_scopes() -> None:
    """Have mmengine find the configs of the maintained fork of mmsegmentation.

    mmengine looks for the distribution `mmsegmentation`. Of the three task libraries only this one
    has another name than its import package, so only here the lookup by import name fails.
    """
    try:
        importlib.metadata.distribution('mmsegmentation')
    except importlib.metadata.PackageNotFoundError:
        utils.MODULE2PACKAGE['mmseg'] = _DISTRIBUTION
