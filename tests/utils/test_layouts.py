from collections.abc import Mapping
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.runner import load_checkpoint as load_by_mmengine
from torch import nn

from linvis import compat
from linvis.engine.checkpoint_match import check_backbone, check_weights
from linvis.models import VRWKV, ViG, ViGHierarchical
from linvis.utils.checkpoint import (
    CheckpointError,
    LoadReport,
    load_checkpoint,
    load_state_dict_into,
    register_safe_loader,
)
from linvis.utils.layouts import to_openmmlab_names

PLAIN = {'embed_dims': 16, 'depth': 2, 'num_heads': 2}
STAGES = {'embed_dims': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 2, 2)}
BACKBONES = {
    'vig': {'type': 'linvis.ViG', 'arch': PLAIN, 'img_size': 32},
    'vig-h': {'type': 'linvis.ViGHierarchical', 'arch': STAGES},
}
families = pytest.mark.parametrize('family', BACKBONES)


@pytest.fixture
def safe_loader(monkeypatch):
    """The loader in place for one test."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    register_safe_loader()


def backbone_of(family: str, **kwargs: Any) -> nn.Module:
    return MODELS.build(BACKBONES[family] | kwargs)


def classifier_of(family: str) -> nn.Module:
    compat.install()
    channels = {'vig': 16, 'vig-h': 64}[family]
    head = {'type': 'LinearClsHead', 'num_classes': 10, 'in_channels': channels}
    settings = {
        'type': 'ImageClassifier',
        'backbone': BACKBONES[family],
        'neck': {'type': 'GlobalAveragePooling'},
        'head': head,
    }
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(settings)


def authors_weights(family: str) -> dict[str, torch.Tensor]:
    """A classifier under the authors' names, of random values."""
    names = {'head.fc.': 'head.', 'backbone.': ''}
    if family == 'vig-h':
        names = {
            'head.fc.': 'classifier.head.',
            'backbone.outnorm3.': 'classifier.norm.',
            'backbone.': '',
        }
    weights = {}
    for name, value in classifier_of(family).state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        weights[names[prefix] + name.removeprefix(prefix)] = torch.randn_like(value)
    return weights


def assert_loaded(model: nn.Module, authors: Mapping[str, torch.Tensor], family: str) -> None:
    """A classifier has the authors' values, by three tensors and the number of all."""
    own = model.state_dict()
    norm, head, block = {
        'vig': ('norm.weight', 'head.weight', 'blocks.1.attn.qkv_proj.weight'),
        'vig-h': (
            'classifier.norm.weight',
            'classifier.head.weight',
            'layers.2.blocks.0.op.qkv_proj.weight',
        ),
    }[family]
    own_norm = {'vig': 'norm', 'vig-h': 'outnorm3'}[family]
    assert len(own) == len(authors)
    torch.testing.assert_close(own[f'backbone.{own_norm}.weight'], authors[norm])
    torch.testing.assert_close(own['head.fc.weight'], authors[head])
    torch.testing.assert_close(own[f'backbone.{block}'], authors[block])


@families
def test_classifier_of_the_authors_is_loaded_as_a_whole(tmp_path, family, safe_loader):
    authors = authors_weights(family)
    torch.save({'model': authors, 'max_accuracy': 77.2}, tmp_path / 'authors.pth')
    model = classifier_of(family)
    assert load_state_dict_into(model, tmp_path / 'authors.pth') == LoadReport([], [])
    assert_loaded(model, authors, family)

    model = classifier_of(family)
    given = load_by_mmengine(model, str(tmp_path / 'authors.pth'), strict=True)['state_dict']
    assert_loaded(model, authors, family)
    check_weights(model, given, 'authors.pth')
    check_backbone(model, given, 'authors.pth')


@families
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_backbone_takes_a_classifier_and_leaves_the_head_out(tmp_path, family, prefix, safe_loader):
    authors = authors_weights(family)
    path = str(tmp_path / 'authors.pth')
    torch.save({'model': {f'{prefix}{name}': value for name, value in authors.items()}}, path)
    loaded = backbone_of(family)
    assert load_state_dict_into(loaded, path) == LoadReport([], [])
    init_cfg = {'type': 'Pretrained', 'checkpoint': path, 'prefix': 'backbone.'}
    initialised = backbone_of(family, init_cfg=init_cfg)
    initialised.init_weights()
    expected = {
        'vig': ('norm.weight', 'norm.weight'),
        'vig-h': ('outnorm3.weight', 'classifier.norm.weight'),
    }[family]
    for backbone in (loaded, initialised):
        torch.testing.assert_close(backbone.state_dict()[expected[0]], authors[expected[1]])

    backbone = backbone_of(family, init_cfg={'type': 'Pretrained', 'checkpoint': path})
    with pytest.raises(CheckpointError, match=r"strip a prefix \(prefix='backbone\.'\)"):
        backbone.init_weights()


def test_outputs_that_a_classifier_lacks_keep_their_initial_norms():
    backbone = backbone_of('vig-h', out_indices=(0, 1, 2, 3))
    authors = authors_weights('vig-h')
    report = load_state_dict_into(backbone, {'model': authors}, strict=False)
    parts = ('weight', 'bias')
    assert report == LoadReport([f'outnorm{i}.{part}' for i in (0, 1, 2) for part in parts], [])
    assert (backbone.outnorm0.weight == 1).all()
    torch.testing.assert_close(backbone.outnorm3.bias, authors['classifier.norm.bias'])


def test_dense_backbone_of_the_authors_is_loaded():
    backbone = backbone_of('vig-h', out_indices=(0, 1, 2, 3))
    weights = {name: torch.randn_like(value) for name, value in backbone.state_dict().items()}
    assert load_state_dict_into(backbone, {'model': weights}) == LoadReport([], [])
    torch.testing.assert_close(dict(backbone.state_dict()), weights)


def test_averaged_weights_are_named_like_the_others(tmp_path):
    authors = authors_weights('vig-h')
    averaged = {name: value + 1 for name, value in authors.items()}
    torch.save({'model': authors, 'model_ema': averaged}, tmp_path / 'authors.pth')
    model = classifier_of('vig-h')
    load_state_dict_into(model, load_checkpoint(tmp_path / 'authors.pth')['model_ema'])
    assert_loaded(model, averaged, 'vig-h')


def test_older_names_and_convolutions_of_one_pixel_are_known():
    authors = authors_weights('vig-h')
    older = {}
    for name, value in authors.items():
        old = name.replace('.norm.', '.ln_1.') if name.startswith('layers.') else name
        old = old.replace('.op.', '.self_attention.').removeprefix('classifier.')
        if value.ndim == 2 and not name.startswith('classifier.'):
            value = value[:, :, None, None]
        older[old] = value
    assert 'head.weight' in older
    assert 'layers.0.blocks.0.self_attention.gk_proj.1.weight' in older
    assert older['layers.1.blocks.0.mlp.fc2.weight'].ndim == 4
    model = classifier_of('vig-h')
    load_state_dict_into(model, {'model': older})
    assert_loaded(model, authors, 'vig-h')


def test_names_of_the_older_stem_are_translated():
    weights = {
        'patch_embed.proj.weight': 0,
        'patch_embed.norm.bias': 1,
        'layers.0.blocks.0.op.gk_proj.0.weight': 2,
        'layers.1.blocks.0.op.gk_proj.0.weight': 3,
        'norm.weight': 4,
    }
    assert to_openmmlab_names(weights) == {
        'patch_embed.0.weight': 0,
        'patch_embed.2.bias': 1,
        'layers.0.blocks.0.op.gk_proj.0.weight': 2,
        'layers.1.blocks.0.op.gk_proj.0.weight': 3,
        'outnorm1.weight': 4,
    }


@families
def test_own_checkpoints_keep_their_names(family):
    for module in (backbone_of(family), classifier_of(family)):
        weights = module.state_dict()
        renamed = to_openmmlab_names(weights)
        assert list(renamed) == list(weights)
        assert load_state_dict_into(module, weights) == LoadReport([], [])


def test_other_networks_are_left_alone():
    weights = VRWKV({'embed_dims': 8, 'depth': 1}, img_size=32).state_dict()
    assert to_openmmlab_names(weights) is weights
    others = {'blocks.0.attn.qkv.weight': torch.zeros(1), 'head.weight': torch.zeros(1)}
    assert to_openmmlab_names(others) is others


def test_other_sizes_are_refused():
    authors = authors_weights('vig')
    with pytest.raises(CheckpointError, match=r'are unknown here \(blocks\.1\.'):
        load_state_dict_into(ViG({**PLAIN, 'depth': 1}), {'model': authors})
    with pytest.raises(CheckpointError, match='does not fit this ViGHierarchical'):
        load_state_dict_into(ViGHierarchical(STAGES), {'model': authors}, strict=False)
