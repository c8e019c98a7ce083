import math
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from linvis.models import VRWKV
from linvis.models.layers import ChannelMix, SpatialMix

KEY_LISTS = Path(__file__).parents[3] / 'shared' / 'reference' / 'checkpoint_keys'


def shapes_of(backbone: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in backbone.state_dict().items()}


def published_shapes(arch: str, tokens: int = 196) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoints, without the prefix and the head."""
    width, depth, scaled, key_norm = {
        'tiny': (192, 12, False, False),
        'small': (384, 12, True, False),
        'base': (768, 12, True, False),
        'large': (1024, 24, True, True),
    }[arch]
    vector, hidden = (width,), 4 * width

    def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
        return {f'{name}.weight': (channels,), f'{name}.bias': (channels,)}

    shapes = {
        'pos_embed': (1, tokens, width),
        'patch_embed.projection.weight': (width, 3, 16, 16),
        'patch_embed.projection.bias': vector,
        **norm('layers.0.ln0', width),
        **norm('ln1', width),
    }
    for index in range(depth):
        layer = f'layers.{index}'
        shapes |= norm(f'{layer}.ln1', width) | norm(f'{layer}.ln2', width)
        if scaled:
            shapes |= {f'{layer}.gamma1': vector, f'{layer}.gamma2': vector}
        shapes |= {f'{layer}.att.spatial_{name}': vector for name in ('decay', 'first')}
        shapes |= {f'{layer}.att.spatial_mix_{name}': (1, 1, width) for name in 'kvr'}
        shapes |= {
            f'{layer}.att.{name}.weight': (width, width)
            for name in ('key', 'value', 'receptance', 'output')
        }
        shapes |= {f'{layer}.ffn.spatial_mix_{name}': (1, 1, width) for name in 'kr'}
        shapes |= {
            f'{layer}.ffn.key.weight': (hidden, width),
            f'{layer}.ffn.receptance.weight': (width, width),
            f'{layer}.ffn.value.weight': (width, hidden),
        }
        if key_norm:
            shapes |= norm(f'{layer}.att.key_norm', width) | norm(f'{layer}.ffn.key_norm', hidden)
    return shapes


@pytest.mark.parametrize('arch', VRWKV.archs)
def test_state_dict_has_the_published_names_and_shapes(arch):
    with torch.device('meta'):
        backbone = VRWKV(arch)
    assert shapes_of(backbone) == published_shapes(arch)


@pytest.mark.skipif(not KEY_LISTS.is_dir(), reason='no lists of published checkpoint entries')
@pytest.mark.parametrize(
    ('arch', 'file', 'img_size'),
    [
        ('tiny', 'vrwkv_t.txt', 224),
        ('small', 'vrwkv_s.txt', 224),
        ('base', 'vrwkv_b.txt', 224),
        ('large', 'vrwkv_l_internimage_192.txt', 192),
    ],
)
def test_state_dict_is_that_of_the_published_file(arch, file, img_size):
    rows = [line.split('\t') for line in (KEY_LISTS / file).read_text().splitlines()[1:]]
    listed = {
        name.removeprefix('backbone.'): literal_eval(shape)
        for name, shape in rows
        if name.startswith('backbone.')
    }
    with torch.device('meta'):
        backbone = VRWKV(arch, img_size=img_size)
    assert shapes_of(backbone) == listed


def shifted(tokens: torch.Tensor, rows: int, cols: int, t: int, c: int) -> float:
    """Channel c of the neighbour that its quarter looks at; zero outside the picture."""
    quarter = tokens.shape[1] // 4
    if c >= 4 * quarter:
        return tokens[t, c].item()
    down, right = ((0, -1), (0, 1), (-1, 0), (1, 0))[c // quarter]
    row, col = t // cols + down, t % cols + right
    return tokens[row * cols + col, c].item() if 0 <= row < rows and 0 <= col < cols else 0.0


def mixed(tokens: torch.Tensor, mu: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    neighbours = torch.tensor(
        [
            [shifted(tokens, rows, cols, t, c) for c in range(tokens.shape[1])]
            for t in range(len(tokens))
        ]
    )
    return tokens * mu[0, 0] + neighbours * (1 - mu[0, 0])


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
    return module


@pytest.mark.parametrize('key_norm', [False, True])
@torch.no_grad()
def test_spatial_mix_equals_its_definition(key_norm):
    rows, cols, channels = 2, 3, 9
    mix = randomised(SpatialMix(channels, 1, 3, key_norm=key_norm, backend='auto'))
    tokens = torch.randn(rows * cols, channels)
    k, v, r = (
        mixed(tokens, getattr(mix, f'spatial_mix_{name[0]}'), rows, cols)
        @ getattr(mix, name).weight.T
        for name in ('key', 'value', 'receptance')
    )
    count = len(tokens)
    wkv = torch.zeros_like(tokens)
    for c in range(channels):
        w, u = mix.spatial_decay[c] / count, mix.spatial_first[c] / count
        for t in range(count):
            weights = [
                math.exp(k[t, c] + u if s == t else k[s, c] - w * (abs(t - s) - 1))
                for s in range(count)
            ]
            wkv[t, c] = sum(a * b for a, b in zip(weights, v[:, c], strict=True)) / sum(weights)
    expected = (torch.sigmoid(r) * mix.key_norm(wkv)) @ mix.output.weight.T
    torch.testing.assert_close(mix(tokens[None], (rows, cols))[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('key_norm', [False, True])
@torch.no_grad()
def test_channel_mix_equals_its_definition(key_norm):
    rows, cols, channels = 3, 2, 8
    mix = randomised(ChannelMix(channels, 0, 2, 4, key_norm=key_norm, backend='auto'))
    tokens = torch.randn(rows * cols, channels)
    k = mixed(tokens, mix.spatial_mix_k, rows, cols) @ mix.key.weight.T
    r = mixed(tokens, mix.spatial_mix_r, rows, cols) @ mix.receptance.weight.T
    hidden = mix.key_norm(k.clamp(min=0) ** 2)
    expected = torch.sigmoid(r) * (hidden @ mix.value.weight.T)
    torch.testing.assert_close(mix(tokens[None], (rows, cols))[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('post_norm', [False, True])
@pytest.mark.parametrize('scaled', [False, True])
def test_layer_is_residual_with_the_norm_in_its_place(post_norm, scaled):
    arch = {'embed_dims': 8, 'depth': 2, 'post_norm': post_norm}
    layer = randomised(VRWKV({**arch, 'layer_scale_init': 0.5 if scaled else None}).layers[0])
    x, hw = torch.randn(2, 6, 8), (2, 3)
    gamma1, gamma2 = (layer.gamma1, layer.gamma2) if scaled else (1, 1)
    y = layer.ln0(x)
    if post_norm:
        y = y + gamma1 * layer.ln1(layer.att(y, hw))
        y = y + gamma2 * layer.ln2(layer.ffn(y, hw))
    else:
        y = y + gamma1 * layer.att(layer.ln1(y), hw)
        y = y + gamma2 * layer.ffn(layer.ln2(y), hw)
    torch.testing.assert_close(layer(x, hw), y)


def test_initial_values_are_graded_over_channels_and_depth():
    backbone = VRWKV({'embed_dims': 8, 'depth': 3, 'layer_scale_init': 1e-5})
    first, last = backbone.layers[0], backbone.layers[2]
    for layer in (first, last):
        assert layer.att.spatial_decay[0] == -5
        assert layer.att.spatial_decay[-1] == 3
        zigzag = [math.log(0.3) + 0.5 * step for step in (0, 1, -1, 0, 1, -1, 0, 1)]
        torch.testing.assert_close(layer.att.spatial_first, torch.tensor(zigzag))
        assert (layer.gamma1 == 1e-5).all()
    torch.testing.assert_close(first.att.spatial_decay[4], torch.tensor(8 * (4 / 7) ** 0.7 - 5))
    torch.testing.assert_close(last.att.spatial_decay[4], torch.tensor(8 * (4 / 7) ** 2.0 - 5))
    half = torch.tensor(0.5)
    torch.testing.assert_close(last.att.spatial_mix_k[0, 0, 4], half ** (1 / 3))
    torch.testing.assert_close(last.att.spatial_mix_v[0, 0, 4], half ** (1 / 3) + 0.3)
    torch.testing.assert_close(last.att.spatial_mix_r[0, 0, 4], half ** (1 / 6))
    torch.testing.assert_close(last.ffn.spatial_mix_k, last.att.spatial_mix_k)
    torch.testing.assert_close(last.ffn.spatial_mix_r, last.ffn.spatial_mix_k)
    assert not backbone.pos_embed.any()


def test_drop_path_grows_linearly_over_the_layers():
    backbone = VRWKV({'embed_dims': 8, 'depth': 5}, drop_path_rate=0.4)
    rates = [layer.drop_path.p for layer in backbone.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize('post_norm', [False, True])
@pytest.mark.parametrize('scaled', [False, True])
def test_drop_path_drops_branches_of_whole_samples(post_norm, scaled):
    arch = {'embed_dims': 8, 'depth': 2, 'post_norm': post_norm}
    arch['layer_scale_init'] = 0.5 if scaled else None
    layer = randomised(VRWKV(arch, drop_path_rate=0.5).layers[1])
    x, hw = torch.randn(16, 6, 8), (2, 3)
    gamma1, gamma2 = (layer.gamma1, layer.gamma2) if scaled else (1, 1)
    torch.manual_seed(1)
    output = layer(x, hw)
    torch.manual_seed(1)
    kept = [torch.empty(16, 1, 1).bernoulli_(0.5) / 0.5 for _ in range(2)]
    y = x
    for keep, gamma, norm, mixer in (
        (kept[0], gamma1, layer.ln1, layer.att),
        (kept[1], gamma2, layer.ln2, layer.ffn),
    ):
        y = y + keep * gamma * (norm(mixer(y, hw)) if post_norm else mixer(norm(y), hw))
    assert 0 < sum(int(keep.count_nonzero()) for keep in kept) < 32
    torch.testing.assert_close(output, y)


class _Outputs(TorchDispatchMode):
    """Remembers shape and dtype of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.seen.append((tuple(output.shape), output.dtype))
        return output


@pytest.mark.parametrize('key_norm', [False, True])
def test_hidden_channels_stay_in_the_dtype_of_autocast_unless_they_are_normalised(key_norm):
    # tensors without values, so that what autocast does on a GPU shows on any machine
    with FakeTensorMode(), torch.device('cuda'):
        mix = ChannelMix(8, 0, 2, 4, key_norm=key_norm, backend='torch')
        tokens = torch.empty(2, 6, 8)
        torch.set_autocast_enabled('cuda', True)
        torch.set_autocast_dtype('cuda', torch.bfloat16)
        try:
            with _Outputs() as outputs:
                mix(tokens, (2, 3))
        finally:
            torch.set_autocast_enabled('cuda', False)
            torch.clear_autocast_cache()
    dtypes = {dtype for shape, dtype in outputs.seen if shape == (2, 6, 32)}
    assert dtypes == ({torch.bfloat16, torch.float32} if key_norm else {torch.bfloat16})


def test_one_layer_is_enough():
    (output,) = VRWKV({'embed_dims': 8, 'depth': 1}, drop_path_rate=0.1)(torch.randn(1, 3, 32, 32))
    assert output.isfinite().all()


def test_model_of_half_precision_keeps_the_decay_in_float32():
    backbone = VRWKV({'embed_dims': 8, 'depth': 2}, img_size=64)
    images = torch.randn(1, 3, 64, 64)
    (expected,) = backbone(images)
    (output,) = backbone.bfloat16()(images.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() / expected.norm() < 0.05


def test_arch_is_a_known_name_or_a_complete_dict():
    with pytest.raises(ValueError, match=r"one of tiny, small, base, large or a dict, got 'huge'"):
        VRWKV('huge')
    with pytest.raises(ValueError, match=r"missing: \['depth'\], unknown: \['heads'\]"):
        VRWKV({'embed_dims': 8, 'heads': 2})


def test_is_built_by_its_prefixed_name_from_any_scope():
    backbone = MODELS.build({'type': 'linvis.VRWKV', 'arch': {'embed_dims': 8, 'depth': 1}})
    assert isinstance(backbone, VRWKV)


def test_unknown_backend_is_told_when_the_model_is_built():
    with pytest.raises(ValueError, match=r"one of auto, .*reference, got 'cuda13'"):
        VRWKV({'embed_dims': 8, 'depth': 1}, backend='cuda13')
    assert VRWKV({'embed_dims': 8, 'depth': 1}, backend='torch').layers[0].att.backend == 'torch'
