import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from linvis.models import HybridViR
from linvis.models.layers import ConvBlock, PreNormBlock

ARCH = {'embed_dims': 8, 'depths': (1, 1, 2, 1), 'num_heads': (2, 4)}


@pytest.mark.parametrize(
    ('arch', 'parameters'), [('tiny', 32_279_072), ('small', 59_042_400), ('base', 111_219_744)]
)
def test_number_of_parameters_is_that_of_the_docs(arch, parameters):
    with torch.device('meta'):
        backbone = HybridViR(arch)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters


def test_convolutions_come_before_retention():
    backbone = HybridViR(ARCH, out_indices=(0, 1, 2, 3))
    kinds = [{type(block) for block in stage.blocks} for stage in backbone.layers]
    assert kinds == [{ConvBlock}, {ConvBlock}, {PreNormBlock}, {PreNormBlock}]
    mixers = [block.retention for stage in backbone.layers[2:] for block in stage.blocks]
    assert {(mixer.decay, mixer.direction) for mixer in mixers} == {('2d', 'bidirectional')}
    maps = backbone(torch.randn(1, 3, 70, 64))
    assert [tuple(x.shape) for x in maps] == [
        *((1, 8, 18, 16), (1, 16, 9, 8), (1, 32, 5, 4), (1, 64, 3, 2))
    ]


@torch.no_grad()
def test_conv_block_equals_its_definition():
    block = ConvBlock(6, 0.0)
    x = torch.randn(2, 12, 6)
    y = block.norm(x).transpose(1, 2).reshape(2, 6, 3, 4)
    y = block.conv2(nn.functional.gelu(block.conv1(y)))
    expected = x + y.flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(x, (3, 4)), expected)


@pytest.mark.parametrize('head_norm', [True, False])
def test_heads_are_normalised_where_it_is_asked_for(head_norm):
    names = HybridViR(ARCH, head_norm=head_norm).state_dict()
    assert ('layers.2.blocks.0.retention.head_norm.weight' in names) == head_norm


def test_drop_path_grows_along_the_blocks():
    backbone = HybridViR(ARCH, drop_path_rate=0.4)
    rates = [block.drop_path.p for stage in backbone.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'arch': {**ARCH, 'num_heads': (2,)}}, 'the heads of those after the first two, got'),
        ({'arch': {**ARCH, 'depths': (1, 1), 'num_heads': ()}}, 'at least three stages'),
        ({'arch': {**ARCH, 'depths': 3}}, 'depths of an arch must be whole numbers from 1 on'),
        ({'retention': '3d'}, "retention must be one of 1d, 2d, got '3d'"),
        ({'backend': 'cuda'}, "backend must be one of .*, got 'cuda'"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HybridViR(**{'arch': ARCH, **options})


def test_is_registered():
    assert isinstance(MODELS.build({'type': 'linvis.HybridViR', 'arch': ARCH}), HybridViR)
