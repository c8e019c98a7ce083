"""Registries of scope 'linvis'; configs write type='linvis.Name' and need no custom_imports.

Only mmengine is imported here: mmengine hides an ImportError raised by this module.
"""

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='linvis', locations=['linvis.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='linvis', locations=['linvis.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='linvis', locations=['linvis.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='linvis',
    locations=['linvis.engine'],
)
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='linvis', locations=['linvis.datasets']
)
DATA_SAMPLERS = Registry(
    'data sampler', parent=MMENGINE_DATA_SAMPLERS, scope='linvis', locations=['linvis.datasets']
)
TRANSFORMS = Registry(
    'transform', parent=MMENGINE_TRANSFORMS, scope='linvis', locations=['linvis.datasets']
)
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='linvis', locations=['linvis.engine'])
