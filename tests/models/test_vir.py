import math
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from linvis.models import ViR
from linvis.models.layers import LayerScale, PreNormBlock, Retention
from linvis.models.layers.retention import log_decays

KEY_LISTS = Path(__file__).parents[3] / 'shared' / 'reference' / 'checkpoint_keys'
ARCH = {'embed_dims': 16, 'depth': 2, 'num_heads': 2}
# parameters with a head of 1000 classes, by arch and patch size
PARAMETERS = {
    ('small', 16): 22_059_496,
    ('base', 16): 86_585_320,
    ('large', 16): 304_374_760,
    ('large', 14): 304_251_880,
}
FORMS = [(decay, direction) for decay in ('1d', '2d') for direction in ('causal', 'bidirectional')]
forms = pytest.mark.parametrize(('decay', 'direction'), FORMS)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5)
    return module


@pytest.mark.parametrize(('arch', 'patch_size'), PARAMETERS)
def test_number_of_parameters(arch, patch_size):
    with torch.device('meta'):
        backbone = ViR(arch, patch_size=patch_size)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count + 1000 * (backbone.embed_dims + 1) == PARAMETERS[arch, patch_size]


def test_names_are_those_of_the_authors():
    with torch.device('meta'):
        shapes = {n: tuple(v.shape) for n, v in ViR('small').state_dict().items()}
    expected = {
        'cls_token': (1, 1, 384),
        'pos_embed': (1, 196, 384),
        'patch_embed.proj.weight': (384, 3, 16, 16),
        'patch_embed.proj.bias': (384,),
        'norm.weight': (384,),
        'norm.bias': (384,),
    }
    for index in range(12):
        block = f'blocks.{index}'
        for name, shape in (
            ('retention.qkv', (1152, 384)),
            ('retention.out_proj', (384, 384)),
            ('mlp.fc1', (1536, 384)),
            ('mlp.fc2', (384, 1536)),
            ('norm1', (384,)),
            ('norm2', (384,)),
        ):
            expected |= {f'{block}.{name}.weight': shape, f'{block}.{name}.bias': shape[:1]}
        expected |= {f'{block}.ls1.gamma': (384,), f'{block}.ls2.gamma': (384,)}
    assert shapes == expected


@pytest.mark.skipif(not KEY_LISTS.is_dir(), reason='no lists of published checkpoint entries')
@pytest.mark.parametrize(('arch', 'patch_size'), PARAMETERS)
def test_state_dict_is_that_of_the_published_code(arch, patch_size):
    lines = (KEY_LISTS / f'vir_{arch[0]}{patch_size}.txt').read_text().splitlines()[1:]
    listed = {key: literal_eval(shape) for key, shape in (line.split('\t') for line in lines)}
    with torch.device('meta'):
        backbone = ViR(arch, patch_size=patch_size)
    assert listed.pop('head.weight') == (1000, backbone.embed_dims)
    assert listed.pop('head.bias') == (1000,)
    assert {key: tuple(value.shape) for key, value in backbone.state_dict().items()} == listed


def test_decays_are_those_of_the_paper():
    gammas = log_decays(6).exp()
    expected = [1 - math.exp(x) for x in torch.linspace(math.log(1 / 32), math.log(1 / 512), 6)]
    torch.testing.assert_close(gammas, torch.tensor(expected))
    assert gammas[0] == pytest.approx(1 - 1 / 32)
    assert gammas[-1] == pytest.approx(1 - 1 / 512)


@forms
@pytest.mark.parametrize('head_norm', [False, True], ids=['no norm', 'norm'])
@torch.no_grad()
def test_token_mixer_equals_its_definition(head_norm, decay, direction):
    rows, cols, channels, heads = 3, 4, 8, 2
    tokens = rows * cols + 1
    mixer = randomised(
        Retention(
            channels, heads, decay=decay, direction=direction, head_norm=head_norm, backend='auto'
        )
    )
    x = torch.randn(1, tokens, channels)
    places = [(i // cols, i % cols) for i in range(rows * cols)] + [(rows, cols - 1)]
    if decay == '1d':
        places = [(i, 0) for i in range(tokens)]
    q, k, v = (y.view(tokens, heads, -1) for y in mixer.qkv(x[0]).chunk(3, -1))
    out = torch.zeros_like(v)
    for t, (row, col) in enumerate(places):
        for s, (other_row, other_col) in enumerate(places):
            steps = row - other_row, col - other_col
            if direction == 'causal' and min(steps) < 0:
                continue
            weight = (mixer.log_gamma * (abs(steps[0]) + abs(steps[1]))).exp()
            out[t] += (weight * (q[t] * k[s]).sum(-1) / math.sqrt(channels // heads))[:, None] * v[
                s
            ]
    if head_norm:
        mean_square = out.square().mean(-1, keepdim=True)
        out = out / (mean_square + 1e-6).sqrt() * mixer.head_norm.weight
    expected = mixer.out_proj(out.flatten(1))
    torch.testing.assert_close(mixer(x, (rows, cols))[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_block_scales_its_branches():
    mixer = Retention(8, 2, decay='2d', direction='causal', head_norm=False, backend='auto')
    parts = {
        'norm1': nn.LayerNorm(8),
        'retention': mixer,
        'ls1': LayerScale(8, 0.5),
        'norm2': nn.LayerNorm(8),
        'mlp': nn.Linear(8, 8),
        'ls2': LayerScale(8, 0.25),
    }
    block = PreNormBlock(0.0, **parts)
    x = torch.randn(2, 6, 8)
    y = x + 0.5 * mixer(parts['norm1'](x), (2, 3))
    expected = y + 0.25 * parts['mlp'](parts['norm2'](y))
    torch.testing.assert_close(block(x, (2, 3)), expected)
    with pytest.raises(ValueError, match='has 4 parts, or 6 with layer scale, got 1'):
        PreNormBlock(0.0, norm1=nn.LayerNorm(8))


@pytest.mark.parametrize('decay', ['1d', '2d'])
def test_causal_patches_do_not_see_what_follows(decay):
    backbone = randomised(ViR(ARCH, retention=decay, img_size=64, out_type='raw'))
    images = torch.randn(1, 3, 64, 48)
    changed = images.clone()
    changed[:, :, 32:] += 1.0  # rows 2 and 3
    (a,), (b,) = backbone(images), backbone(changed)
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, -1], b[:, -1])  # the class token sees them


def test_class_token_is_an_output():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 48)
    outputs = []
    for out_type in ('raw', 'cls_token'):
        torch.manual_seed(1)
        outputs.append(ViR(ARCH, img_size=32, out_type=out_type)(images)[0])
    assert torch.equal(outputs[0][:, -1], outputs[1])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_decays(dtype):
    backbone = randomised(ViR(ARCH, img_size=32))
    images = torch.randn(1, 3, 32, 48)
    (expected,) = backbone(images)
    decays = backbone.blocks[0].retention.log_gamma.clone()
    (features,) = backbone.to(dtype)(images.to(dtype))
    torch.testing.assert_close(features.float(), expected, rtol=0.1, atol=0.1)
    backbone.float()
    assert torch.equal(backbone.blocks[0].retention.log_gamma, decays)


def test_decays_are_there_after_meta_initialisation():
    with torch.device('meta'):
        backbone = ViR(ARCH, img_size=32)
    backbone.to_empty(device='cpu')
    assert torch.equal(backbone.blocks[1].retention.log_gamma, log_decays(2))


def test_exports_with_a_dynamic_batch():
    backbone = randomised(ViR(ARCH, img_size=32)).eval()
    program = torch.export.export(
        backbone, (torch.randn(2, 3, 32, 48),), dynamic_shapes=({0: torch.export.Dim('b')},)
    )
    images = torch.randn(3, 3, 32, 48)
    torch.testing.assert_close(program.module()(images), backbone(images))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'arch': {**ARCH, 'num_heads': 3}}, '16 channels and 3 heads'),
        ({'arch': {**ARCH, 'num_heads': 2.0}}, 'num_heads of an arch must be a whole number'),
        (
            {'arch': {**ARCH, 'depth': 0}},
            'depth of an arch must be a whole number from 1 on, got 0',
        ),
        ({'patch_size': 0}, 'patch_size must be at least 1, got 0'),
        ({'arch': 'tiny'}, 'arch must be one of small, base, large'),
        ({'retention': '3d'}, "retention must be one of 1d, 2d, got '3d'"),
        ({'direction': 'forward'}, "direction must be one of causal, bidirectional, got 'forward'"),
        ({'backend': 'cuda'}, "backend must be one of .*, got 'cuda'"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViR(**{'arch': ARCH, **options})


def test_is_registered():
    assert isinstance(MODELS.build({'type': 'linvis.ViR', 'arch': ARCH, 'img_size': 32}), ViR)
