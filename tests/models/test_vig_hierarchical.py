from ast import literal_eval
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from linvis.models import ViGHierarchical
from linvis.models.layers import GatedLinearAttention, to_featmap, to_tokens

KEY_LISTS = Path(__file__).parents[3] / 'shared' / 'reference' / 'checkpoint_keys'
ARCH = {'embed_dims': 8, 'depths': (1, 2, 1), 'num_heads': (1, 2, 2)}


def shapes_of(backbone: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in backbone.state_dict().items()}


def published_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoints without the classifier, and four output norms.

    Hidden channels are 8 / 3 of the channels, rounded up to a multiple of 32.
    """
    width, depths, hidden = {
        'tiny': (96, (2, 2, 5, 2), (256, 512, 1024, 2048)),
        'small': (96, (2, 2, 17, 2), (256, 512, 1024, 2048)),
        'base': (128, (2, 2, 17, 2), (352, 704, 1376, 2752)),
    }[arch]
    shapes = {
        'patch_embed.0.weight': (width // 2, 3, 3, 3),
        'patch_embed.0.bias': (width // 2,),
        'patch_embed.2.weight': (width // 2,),
        'patch_embed.2.bias': (width // 2,),
        'patch_embed.5.weight': (width, width // 2, 3, 3),
        'patch_embed.5.bias': (width,),
        'patch_embed.7.weight': (width,),
        'patch_embed.7.bias': (width,),
    }
    for stage in range(4):
        dims = width * 2**stage
        for index in range(depths[stage]):
            block = f'layers.{stage}.blocks.{index}'
            shapes |= {f'{block}.{n}.{p}': (dims,) for n in ('norm', 'norm2') for p in PARTS}
            shapes |= {
                f'{block}.op.in_proj.0.weight': (dims, 1, 3, 3),
                f'{block}.op.qkv_proj.weight': (2 * dims, dims),
                f'{block}.op.gk_proj.0.weight': (16, dims),
                f'{block}.op.gk_proj.1.weight': (dims, 16),
                f'{block}.op.gk_proj.1.bias': (dims,),
                f'{block}.op.g_proj.weight': (dims, dims),
                f'{block}.op.g_proj.bias': (dims,),
                f'{block}.op.g_norm.weight': (32,),
                f'{block}.op.l_norm.weight': (32,),
                f'{block}.op.o_proj.weight': (dims, dims),
                f'{block}.mlp.fc1.weight': (2 * hidden[stage], dims),
                f'{block}.mlp.fc2.weight': (dims, hidden[stage]),
            }
        if stage < 3:
            down = f'layers.{stage}.downsample'
            shapes |= {f'{down}.{p}': (2 * dims,) for p in ('1.bias', '3.weight', '3.bias')}
            shapes[f'{down}.1.weight'] = (2 * dims, dims, 3, 3)
        shapes |= {f'outnorm{stage}.{part}': (dims,) for part in PARTS}
    return shapes


PARTS = ('weight', 'bias')


@pytest.mark.parametrize('arch', ViGHierarchical.archs)
def test_state_dict_has_the_published_names_and_shapes(arch):
    with torch.device('meta'):
        backbone = ViGHierarchical(arch, out_indices=(0, 1, 2, 3))
    assert shapes_of(backbone) == published_shapes(arch)


@pytest.mark.skipif(not KEY_LISTS.is_dir(), reason='no lists of published checkpoint entries')
@pytest.mark.parametrize('arch', ViGHierarchical.archs)
def test_state_dict_is_that_of_the_published_file(arch):
    lines = (KEY_LISTS / f'vig_h_{arch[0]}.txt').read_text().splitlines()[1:]
    listed = {name: literal_eval(shape) for name, shape in (line.split('\t') for line in lines)}
    with torch.device('meta'):
        backbone = ViGHierarchical(arch)
    assert listed.pop('classifier.head.weight') == (1000, backbone.out_channels[0])
    assert listed.pop('classifier.head.bias') == (1000,)
    listed |= {f'outnorm3.{part}': listed.pop(f'classifier.norm.{part}') for part in PARTS}
    assert shapes_of(backbone) == listed


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
    return module


def normed_map(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def halved(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    return F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)


@pytest.mark.parametrize('arch', ViGHierarchical.archs)
def test_token_mixer_has_no_activations(arch):
    with torch.device('meta'):
        mixers = [m for m in ViGHierarchical(arch).modules() if isinstance(m, GatedLinearAttention)]
    assert len(mixers) >= 11
    for mixer in mixers:
        assert type(mixer.in_proj[1]) is type(mixer.out_act) is nn.Identity


@pytest.mark.parametrize('size', [(1, 1), (33, 47), (64, 40)], ids=str)
@torch.no_grad()
def test_stages_equal_their_definition_for_any_size(size):
    backbone = randomised(ViGHierarchical(ARCH, out_indices=(0, 1, 2)))
    images = torch.randn(1, 3, *size)
    first, norm, _, second, last = backbone.patch_embed
    x = normed_map(halved(F.gelu(normed_map(halved(images, first), norm)), second), last)
    for index, (stage, output) in enumerate(zip(backbone.layers, backbone(images), strict=True)):
        hw = tuple(-(-side // (4 * 2**index)) for side in size)
        assert x.shape[2:] == hw
        tokens = to_tokens(x)
        for block in stage.blocks:
            tokens = tokens + block.op(block.norm(tokens), hw)
            tokens = tokens + block.mlp(block.norm2(tokens))
        x = to_featmap(tokens, hw)
        expected = normed_map(x, backbone.get_submodule(f'outnorm{index}'))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        if index < 2:
            conv, norm = stage.downsample
            x = normed_map(halved(x, conv), norm)


@pytest.mark.parametrize('arch', ViGHierarchical.archs)
def test_outputs_feed_a_pyramid_of_strides_4_to_32(arch):
    with torch.device('meta'):
        backbone = ViGHierarchical(arch, out_indices=(0, 1, 2, 3))
        maps = backbone(torch.empty(2, 3, 100, 140))
    width = backbone.embed_dims
    assert backbone.strides == (4, 8, 16, 32)
    assert backbone.out_channels == (width, 2 * width, 4 * width, 8 * width)
    assert [tuple(each.shape[2:]) for each in maps] == [(25, 35), (13, 18), (7, 9), (4, 5)]


def test_stages_behind_the_last_output_are_not_run():
    backbone = ViGHierarchical(ARCH, out_indices=(0, 1))
    for parameter in backbone.layers[2].parameters():
        nn.init.constant_(parameter, torch.nan)
    nn.init.constant_(backbone.layers[1].downsample[0].weight, torch.nan)
    assert all(output.isfinite().all() for output in backbone(torch.randn(1, 3, 32, 32)))


def test_checkpointing_recomputes_block_by_block():
    backbone = ViGHierarchical(ARCH, with_cp=True)
    calls: list[nn.Module] = []
    for stage in backbone.layers:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda module, *_: calls.append(module))
    (output,) = backbone(torch.randn(1, 3, 32, 32))
    assert len(calls) == 4
    output.sum().backward()
    assert calls[4:] == calls[3::-1]


def test_norms_of_frozen_stages_are_frozen():
    backbone = ViGHierarchical(ARCH, out_indices=(0, 1, 2), frozen_stages=2).train()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(('patch', 'layers.0', 'layers.1')) for name in trained)
    assert {name for name in trained if name.startswith('outnorm')} == {
        'outnorm2.weight',
        'outnorm2.bias',
    }


def test_a_downsampling_learns_as_the_block_before_it():
    backbone = ViGHierarchical(ARCH, out_indices=(0, 2))
    depths = {name: backbone.get_layer_depth(name)[0] for name, _ in backbone.named_parameters()}
    assert depths['layers.0.downsample.1.weight'] == depths['layers.0.blocks.0.norm.weight'] == 1
    assert depths['layers.1.downsample.3.bias'] == depths['layers.1.blocks.1.op.g_norm.weight'] == 3
    assert depths['layers.2.blocks.0.mlp.fc1.weight'] == 4
    assert depths['outnorm0.weight'] == depths['outnorm2.weight'] == 5


def test_drop_path_grows_linearly_over_the_blocks_of_all_stages():
    backbone = ViGHierarchical(ARCH, drop_path_rate=0.3)
    rates = [block.drop_path.p for stage in backbone.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_initial_values():
    arch = {'embed_dims': 96, 'depths': (1,), 'num_heads': (3,)}
    block = ViGHierarchical(arch).layers[0].blocks[0]
    for linear in (block.op.qkv_proj, block.op.gk_proj[1], block.op.o_proj, block.mlp.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not block.op.gk_proj[1].bias.any()
    bound = 2**-2.5 * (6 / (9 + 9 * 96)) ** 0.5  # of Xavier's uniform distribution
    assert 0.9 * bound < block.op.in_proj[0].weight.abs().max() <= bound


def test_arch_is_a_known_name_or_a_complete_dict():
    with pytest.raises(ValueError, match=r"one of tiny, small, base or a dict, got 'large'"):
        ViGHierarchical('large')
    with pytest.raises(ValueError, match=r"nothing else; missing: \['num_heads'\], unknown: \[\]"):
        ViGHierarchical({'embed_dims': 8, 'depths': (1, 1)})
    with pytest.raises(ValueError, match=r'got depths \(1, 2, 1\) and num_heads \(1, 2\)'):
        ViGHierarchical(ARCH | {'num_heads': (1, 2)})


def test_is_built_by_its_prefixed_name_from_any_scope():
    settings = {'type': 'linvis.ViGHierarchical', 'arch': ARCH}
    assert isinstance(MODELS.build(settings), ViGHierarchical)


def test_unknown_backend_is_told_when_the_model_is_built():
    with pytest.raises(ValueError, match=r"one of auto, .*reference, got 'cuda13'"):
        ViGHierarchical(ARCH, backend='cuda13')
    backbone = ViGHierarchical(ARCH, backend='torch')
    assert backbone.layers[2].blocks[0].op.backend == 'torch'
