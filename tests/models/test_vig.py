from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from linvis.models import ViG
from linvis.models.layers import (
    ConvPatchEmbed,
    GatedLinearAttention,
    PreNormBlock,
    RMSNorm,
    SwiGLU,
)

KEY_LISTS = Path(__file__).parents[3] / 'shared' / 'reference' / 'checkpoint_keys'
ARCH = {'embed_dims': 16, 'depth': 2, 'num_heads': 2}


def shapes_of(backbone: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in backbone.state_dict().items()}


def published_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoints, without the head."""
    width, hidden = {'tiny': (192, 512), 'small': (384, 1024), 'base': (768, 2048)}[arch]
    half = width // 2
    shapes = {
        'pos_embed': (1, 196, width),
        'patch_embed.proj.0.weight': (half, 3, 9, 9),
        'patch_embed.proj.3.weight': (width, half, 3, 3),
        'norm.weight': (width,),
    }
    for index, channels in ((0, half), (1, half), (3, width), (4, width)):
        shapes[f'patch_embed.proj.{index}.bias'] = (channels,)
    shapes |= {'patch_embed.proj.1.weight': (half,), 'patch_embed.proj.4.weight': (width,)}
    for index in range(12):
        attn, mlp = f'blocks.{index}.attn', f'blocks.{index}.mlp'
        shapes |= {
            f'{attn}_norm.weight': (width,),
            f'{attn}.in_proj.0.weight': (width, 1, 3, 3),
            f'{attn}.qkv_proj.weight': (2 * width, width),
            f'{attn}.gk_proj.0.weight': (16, width),
            f'{attn}.gk_proj.1.weight': (width, 16),
            f'{attn}.gk_proj.1.bias': (width,),
            f'{attn}.g_proj.weight': (width, width),
            f'{attn}.g_proj.bias': (width,),
            f'{attn}.g_norm.weight': (64,),
            f'{attn}.l_norm.weight': (64,),
            f'{attn}.o_proj.weight': (width, width),
            f'{mlp}_norm.weight': (width,),
            f'{mlp}.gate_proj.weight': (2 * hidden, width),
            f'{mlp}.down_proj.weight': (width, hidden),
        }
    return shapes


@pytest.mark.parametrize('arch', ViG.archs)
def test_state_dict_has_the_published_names_and_shapes(arch):
    with torch.device('meta'):
        backbone = ViG(arch)
    assert shapes_of(backbone) == published_shapes(arch)


@pytest.mark.skipif(not KEY_LISTS.is_dir(), reason='no lists of published checkpoint entries')
@pytest.mark.parametrize('arch', ViG.archs)
def test_state_dict_is_that_of_the_published_file(arch):
    lines = (KEY_LISTS / f'vig_{arch[0]}.txt').read_text().splitlines()[1:]
    listed = {name: literal_eval(shape) for name, shape in (line.split('\t') for line in lines)}
    with torch.device('meta'):
        backbone = ViG(arch)
    width = backbone.embed_dims
    assert listed.pop('head.weight') == (1000, width)
    assert listed.pop('head.bias') == (1000,)
    assert shapes_of(backbone) == listed


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
    return module


def normed(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def attended(q, k, v, gate_fwd, gate_bwd) -> torch.Tensor:
    """One head, (T, K) and (T, V), by its two states, token by token."""
    outputs = torch.zeros_like(v)
    for order, gate in ((range(len(q)), gate_fwd), (reversed(range(len(q))), gate_bwd)):
        state = torch.zeros(q.shape[1], v.shape[1])
        for t in order:
            state = gate[t, :, None] * state + k[t, :, None] * v[t]
            outputs[t] += q[t] @ state / 2
    return outputs / q.shape[1] ** 0.5


@pytest.mark.parametrize('conv_act', [False, True])
@pytest.mark.parametrize('out_act', [False, True])
@torch.no_grad()
def test_token_mixer_equals_its_definition(conv_act, out_act):
    rows, cols, channels, heads = 3, 4, 12, 2
    mixer = randomised(
        GatedLinearAttention(channels, heads, conv_act=conv_act, out_act=out_act, backend='auto')
    )
    x = torch.randn(rows * cols, channels)
    padded = torch.zeros(rows + 2, cols + 2, channels)
    padded[1:-1, 1:-1] = x.view(rows, cols, channels)
    kernel = mixer.in_proj[0].weight[:, 0]  # (C, 3, 3)
    local = sum(
        padded[row : row + rows, col : col + cols] * kernel[:, row, col]
        for row in range(3)
        for col in range(3)
    ).reshape(rows * cols, channels)
    local = F.silu(local) if conv_act else local
    q, k, v = (local @ mixer.qkv_proj.weight.T).split((6, 6, 12), dim=1)
    ranked = local @ mixer.gk_proj[0].weight.T
    logits = ranked @ mixer.gk_proj[1].weight.T + mixer.gk_proj[1].bias
    gate_fwd, gate_bwd = torch.sigmoid(logits).pow(1 / 16).chunk(2, dim=1)
    share = torch.sigmoid(local @ mixer.g_proj.weight.T + mixer.g_proj.bias)
    mixed = torch.empty_like(x)
    for head in range(heads):
        key, value = slice(3 * head, 3 * head + 3), slice(6 * head, 6 * head + 6)
        o = attended(q[:, key], k[:, key], v[:, value], gate_fwd[:, key], gate_bwd[:, key])
        o, l = normed(o, mixer.g_norm), normed(local[:, value], mixer.l_norm)
        mixed[:, value] = share[:, value] * o + (1 - share[:, value]) * l
    expected = (F.silu(mixed) if out_act else mixed) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x[None], (rows, cols))[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_channel_mixer_equals_its_definition():
    mixer = randomised(SwiGLU(12, 32, ('gate_proj', 'down_proj')))
    assert mixer.down_proj.weight.shape == (12, 32)
    x = torch.randn(2, 5, 12)
    gate, value = (x @ mixer.gate_proj.weight.T).split(32, dim=-1)
    expected = (gate * torch.sigmoid(gate) * value) @ mixer.down_proj.weight.T
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('dims', 'hidden'), [(192, 512), (384, 1024), (768, 2048), (96, 256)])
def test_hidden_channels_are_rounded_up(dims, hidden):
    with torch.device('meta'):
        assert SwiGLU(dims, 256, ('fc1', 'fc2')).fc2.in_features == hidden


@torch.no_grad()
def test_stem_is_two_convolutions_with_norms():
    stem = randomised(ConvPatchEmbed(3, 8, 16))
    images = torch.randn(1, 3, 20, 41)
    padded = F.pad(images, (0, 7, 0, 12))
    first, norm, _, second, last = stem.proj

    def normed_map(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]

    x = F.conv2d(padded, first.weight, first.bias, stride=8, padding=1)
    assert x.shape[2:] == (4, 6)
    x = F.conv2d(F.silu(normed_map(x, norm)), second.weight, second.bias, stride=2, padding=1)
    tokens, hw = stem(images)
    assert hw == (2, 3)
    assert tokens.is_contiguous()
    expected = normed_map(x, last).flatten(2).mT
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('patch_size', [2, 7])
def test_patch_size_is_an_even_number(patch_size):
    with pytest.raises(ValueError, match=f'an even number from 4 on, got {patch_size}'):
        ViG(ARCH, patch_size=patch_size)


def test_block_is_residual_with_norms_before_the_mixers():
    block = randomised(ViG(ARCH).layers[0])
    x, hw = torch.randn(2, 6, 16), (2, 3)
    y = x + block.attn(block.attn_norm(x), hw)
    y = y + block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(block(x, hw), y)


def test_drop_path_drops_branches_of_whole_samples():
    block = randomised(ViG(ARCH, drop_path_rate=0.5).layers[1])
    x, hw = torch.randn(16, 6, 16), (2, 3)
    torch.manual_seed(1)
    output = block(x, hw)
    torch.manual_seed(1)
    kept = [torch.empty(16, 1, 1).bernoulli_(0.5) / 0.5 for _ in range(2)]
    assert 0 < sum(int(keep.count_nonzero()) for keep in kept) < 32
    y = x + kept[0] * block.attn(block.attn_norm(x), hw)
    y = y + kept[1] * block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(output, y)


def test_drop_path_grows_linearly_over_the_layers():
    backbone = ViG(ARCH | {'depth': 5}, drop_path_rate=0.4)
    rates = [layer.drop_path.p for layer in backbone.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initial_values():
    backbone = ViG({'embed_dims': 192, 'depth': 1, 'num_heads': 3})
    assert backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    block = backbone.layers[0]
    assert block.mlp.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for linear in (block.attn.qkv_proj, block.attn.gk_proj[0], block.attn.o_proj):
        fans = sum(linear.weight.shape)
        bound = 2**-2.5 * (6 / fans) ** 0.5  # of Xavier's uniform distribution
        assert 0.9 * bound < linear.weight.abs().max() <= bound
    assert not block.attn.gk_proj[1].bias.any()
    assert not block.attn.g_proj.bias.any()


class _Outputs(TorchDispatchMode):
    """Remembers shape and dtype of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.seen += [
            (tuple(each.shape), each.dtype)
            for each in (output if isinstance(output, tuple) else (output,))
            if isinstance(each, torch.Tensor)
        ]
        return output


def test_heads_stay_in_the_dtype_of_autocast(monkeypatch):
    # tensors without values, so that what autocast does on a GPU shows on any machine
    monkeypatch.setattr('linvis_ops._dispatch.select', lambda *_: SimpleNamespace(name='triton'))
    with FakeTensorMode(), torch.device('cuda'):
        mixer = GatedLinearAttention(16, 2, conv_act=True, out_act=True, backend='torch')
        tokens = torch.empty(2, 6, 16)
        torch.set_autocast_enabled('cuda', True)
        torch.set_autocast_dtype('cuda', torch.bfloat16)
        try:
            with _Outputs() as outputs:
                mixer(tokens, (2, 3))
        finally:
            torch.set_autocast_enabled('cuda', False)
            torch.clear_autocast_cache()
    of_heads = [dtype for shape, dtype in outputs.seen if shape in ((2, 6, 2, 8), (2, 6, 2, 4))]
    assert set(of_heads) == {torch.bfloat16}


def test_rms_norm_equals_its_definition_in_the_dtype_of_autocast():
    norm = randomised(RMSNorm(6, cast_output=True))
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(norm(x), normed(x, norm))
    with torch.autocast('cpu', torch.bfloat16):
        output = norm(x)
        assert RMSNorm(6)(x.bfloat16()).dtype == torch.float32
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), normed(x, norm), rtol=3e-2, atol=1e-2)


def test_rms_norm_of_small_inputs_depends_on_its_epsilon():
    """The operator's first outputs are far below the root of it."""
    x = 1e-4 * torch.randn(2, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(6)(x), expected)


@pytest.mark.parametrize('arch', ViG.archs)
def test_activations_of_the_token_mixer_are_those_of_the_arch(arch):
    expected = nn.SiLU if arch == 'tiny' else nn.Identity
    for layer in ViG(arch).layers:
        assert type(layer.attn.in_proj[1]) is expected
        assert type(layer.attn.out_act) is expected


def test_model_of_half_precision_stays_near_float32():
    backbone = ViG(ARCH, img_size=64)
    images = torch.randn(1, 3, 64, 64)
    (expected,) = backbone(images)
    (output,) = backbone.bfloat16()(images.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() / expected.norm() < 0.05


def test_one_layer_is_enough():
    (output,) = ViG({**ARCH, 'depth': 1}, drop_path_rate=0.1)(torch.randn(1, 3, 32, 32))
    assert output.isfinite().all()


def test_any_block_takes_parts_under_their_names():
    block = PreNormBlock(0.0, a=nn.Identity(), b=nn.Bilinear(1, 1, 1), c=nn.Identity(), d=nn.ReLU())
    assert [name for name, _ in block.named_parameters()] == ['b.weight', 'b.bias']


def test_arch_is_a_known_name_or_a_complete_dict():
    with pytest.raises(ValueError, match=r"one of tiny, small, base or a dict, got 'large'"):
        ViG('large')
    with pytest.raises(ValueError, match=r"missing: \['num_heads'\], unknown: \['heads'\]"):
        ViG({'embed_dims': 8, 'depth': 1, 'heads': 2})
    with pytest.raises(ValueError, match='twice the heads, got 16 channels and 3 heads'):
        ViG(ARCH | {'num_heads': 3})


def test_is_built_by_its_prefixed_name_from_any_scope():
    assert isinstance(MODELS.build({'type': 'linvis.ViG', 'arch': ARCH}), ViG)


def test_unknown_backend_is_told_when_the_model_is_built():
    with pytest.raises(ValueError, match=r"one of auto, .*reference, got 'cuda13'"):
        ViG(ARCH, backend='cuda13')
    assert ViG(ARCH, backend='torch').layers[0].attn.backend == 'torch'
