"""The contract of Backbone, for every arch of every backbone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from linvis.models import (
    VRWKV,
    Backbone,
    HybridViR,
    TokenBackbone,
    ViG,
    ViGHierarchical,
    ViR,
)
from linvis.models.layers import resize_position_embedding
from linvis.utils.checkpoint import CheckpointError
from tools.analysis.complexity import measure

DEPTH = 3


class Published(NamedTuple):
    """What is known of an arch: parameters of the backbone, 10^9 MACs at so many pixels."""

    build: Callable[[], Backbone]
    parameters: int
    gmacs: float
    digits: int = 1  # of gmacs
    pixels: int = 224


def vrwkv(arch: str) -> Callable[..., TokenBackbone]:
    settings = {**VRWKV.archs[arch], 'embed_dims': 24, 'depth': DEPTH}
    return lambda **kwargs: VRWKV(settings, **kwargs)


def vig(arch: str) -> Callable[..., TokenBackbone]:
    settings = {**ViG.archs[arch], 'embed_dims': 24, 'depth': DEPTH, 'num_heads': 2}
    return lambda **kwargs: ViG(settings, **kwargs)


def vir(retention: str, direction: str) -> Callable[..., TokenBackbone]:
    arch = {'embed_dims': 24, 'depth': DEPTH, 'num_heads': 2}
    return lambda **kwargs: ViR(arch, retention=retention, direction=direction, **kwargs)


def vig_hierarchical(img_size: int = 224, **kwargs: Any) -> Backbone:
    """Three stages, so that the last one has the stride of plain backbones; any size fits."""
    arch = {'embed_dims': 8, 'depths': (1, 2, 1), 'num_heads': (1, 2, 2)}
    return ViGHierarchical(arch, **kwargs)


def vir_hybrid(img_size: int = 224, **kwargs: Any) -> Backbone:
    return HybridViR({'embed_dims': 8, 'depths': (1, 2, 1), 'num_heads': (2,)}, **kwargs)


# Each arch with its own settings, but narrow and shallow.
PLAIN = {f'vrwkv-{arch}': vrwkv(arch) for arch in VRWKV.archs}
PLAIN |= {f'vig-{arch}': vig(arch) for arch in ViG.archs}
PLAIN |= {f'vir-{r}-{d}': vir(r, d) for r in ('1d', '2d') for d in ('causal', 'bidirectional')}
BACKBONES: dict[str, Callable[..., Any]] = {
    **PLAIN,
    'vig-hierarchical': vig_hierarchical,
    'vir-hybrid': vir_hybrid,
}

# Published counts include a linear head of 1000 classes, and for large one of two layers.
PUBLISHED = {
    'vrwkv-tiny': Published(lambda: VRWKV('tiny'), 6_155_176 - 193_000, 1.2),
    'vrwkv-small': Published(lambda: VRWKV('small'), 23_820_136 - 385_000, 4.6),
    'vrwkv-base': Published(lambda: VRWKV('base'), 93_645_544 - 769_000, 18.2),
    'vrwkv-large': Published(
        # the positions of 192 pixels, which the published parameters are of
        lambda: VRWKV('large', img_size=192),
        334_881_768 - (1025 * 3072 + 3073 * 1000),
        189.5,
        pixels=384,
    ),
    # The authors' files tell the parameters; MACs are counted by hand, the operator included.
    'vig-tiny': Published(lambda: ViG('tiny'), 5_834_536 - 193_000, 1.20, digits=2),
    'vig-small': Published(lambda: ViG('small'), 22_615_144 - 385_000, 4.54, digits=2),
    'vig-base': Published(lambda: ViG('base'), 89_022_184 - 769_000, 17.7),
    'vig-tiny-1024': Published(
        lambda: ViG('tiny'), 5_834_536 - 193_000, 25.00, digits=2, pixels=1024
    ),
    'vig-h-tiny': Published(lambda: ViGHierarchical('tiny'), 28_600_680 - 769_000, 4.54, digits=2),
    'vig-h-small': Published(
        lambda: ViGHierarchical('small'), 50_051_688 - 769_000, 8.82, digits=2
    ),
    'vig-h-base': Published(
        lambda: ViGHierarchical('base'), 88_904_360 - 1_025_000, 15.65, digits=2
    ),
}

EMBEDDINGS = ('backbone.pos_embed', 'backbone.cls_token', 'backbone.patch_embed.')

backbones = pytest.mark.parametrize('build', BACKBONES.values(), ids=BACKBONES.keys())
plain_backbones = pytest.mark.parametrize('build', PLAIN.values(), ids=PLAIN.keys())


def randomised(backbone: Any) -> Any:
    """Move every parameter off its initial value, of which some are zero or nearly so."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def loss_of(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs)


def gradients(backbone: Backbone, images: torch.Tensor) -> dict[str, torch.Tensor]:
    backbone.zero_grad()
    loss_of(backbone(images)).backward()
    return {name: parameter.grad for name, parameter in backbone.named_parameters()}


@backbones
@pytest.mark.parametrize('size', [(1, 1), (15, 64), (32, 32), (33, 47), (100, 60)], ids=str)
def test_any_size_gives_the_grid_of_begun_patches(build, size):
    backbone = build(img_size=64, out_indices=range(DEPTH))
    outputs = backbone(torch.randn(2, 3, *size))
    for output, channels, stride in zip(
        outputs, backbone.out_channels, backbone.strides, strict=True
    ):
        rows, cols = -(-size[0] // stride), -(-size[1] // stride)
        assert output.shape == (2, channels, rows, cols)
        assert output.isfinite().all()
    assert backbone.strides[-1] == 16


@plain_backbones
def test_padding_is_zeros_at_bottom_and_right(build):
    backbone = randomised(build(img_size=64))
    images = torch.randn(1, 3, 20, 41)
    torch.testing.assert_close(backbone(images), backbone(F.pad(images, (0, 7, 0, 12))))


@backbones
def test_out_indices_select_layers_in_their_order(build):
    images = torch.randn(1, 3, 32, 48)
    wanted = [-1, 0]
    every = randomised(build(img_size=64, out_indices=range(DEPTH)))
    backbone = build(img_size=64, out_indices=wanted)
    weights = every.state_dict()
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    assert wanted == [-1, 0]
    for index, output in zip((DEPTH - 1, 0), backbone(images), strict=True):
        torch.testing.assert_close(output, every(images)[index], rtol=0, atol=0)
    assert backbone.strides == (every.strides[-1], every.strides[0])
    assert backbone.out_channels == (every.out_channels[-1], every.out_channels[0])


@plain_backbones
def test_steps_of_a_plain_backbone_give_its_outputs(build):
    images = torch.randn(1, 3, 32, 48)
    backbone = randomised(build(img_size=64, out_indices=(-1, 0)))
    last, first = backbone(images)
    tokens, hw = backbone.embed(images)
    tokens = backbone.layers[0](tokens, hw)
    torch.testing.assert_close(first, backbone.to_featmap(tokens, hw))
    for layer in backbone.layers[1:]:
        tokens = layer(tokens, hw)
    normalised = backbone.get_submodule(backbone.final_norm_name)(tokens)
    torch.testing.assert_close(last, backbone.to_featmap(normalised, hw))


@pytest.mark.parametrize('out_indices', [DEPTH, -DEPTH - 1, (0, DEPTH), (), [1.0], 'x'], ids=str)
def test_out_indices_outside_the_layers_are_refused(out_indices):
    with pytest.raises(ValueError, match='out_indices must name at least one of 3 layers'):
        BACKBONES['vrwkv-tiny'](out_indices=out_indices)


@backbones
def test_out_types_are_views_of_the_same_features(build):
    images = torch.randn(2, 3, 32, 48)
    outputs = {}
    for out_type in ('featmap', 'raw', 'avg_featmap'):
        torch.manual_seed(0)
        (outputs[out_type],) = build(img_size=64, out_type=out_type)(images)
    with_cls_token = 'cls_token' in build(img_size=64).out_types
    assert outputs['raw'].shape[:2] == (2, 7 if with_cls_token else 6)
    patches = outputs['raw'][:, :6]
    torch.testing.assert_close(outputs['featmap'][:, :, 1, 2], patches[:, 5])
    torch.testing.assert_close(outputs['avg_featmap'], patches.mean(1))


@backbones
def test_double_precision_is_that_of_single_but_for_rounding(build):
    backbone = randomised(build(img_size=64)).eval()
    images = torch.randn(1, 3, 40, 48)
    (single,) = backbone(images)
    (double,) = backbone.double()(images.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single, double.float(), rtol=1e-3, atol=1e-4)


@backbones
def test_drop_path_rates_are_told_when_the_model_is_built(build):
    for rate in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf'drop_path_rate must be .*, got {rate}\.'):
            build(img_size=64, drop_path_rate=rate)


@plain_backbones
@pytest.mark.parametrize('img_size', [(224,), '224', 0, (64, 64, 64), (64.0, 64)], ids=str)
def test_other_picture_sizes_are_refused(build, img_size):
    with pytest.raises(ValueError, match=r'img_size must be one whole number .*, got'):
        build(img_size=img_size)


@pytest.mark.parametrize(
    'shape', [(3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32), (0, 3, 32, 32)], ids=str
)
def test_wrong_pictures_are_refused(shape):
    with pytest.raises(ValueError, match=r'VRWKV takes pictures \(B, 3, H, W\)'):
        BACKBONES['vrwkv-tiny']()(torch.zeros(shape))


def test_integer_pictures_are_refused():
    with pytest.raises(ValueError, match=r'floating-point pictures, got torch\.uint8'):
        BACKBONES['vrwkv-tiny']()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@backbones
def test_gradient_reaches_every_parameter(build):
    backbone = randomised(build(img_size=64, out_type='raw'))
    unreached = [
        name
        for name, gradient in gradients(backbone, torch.randn(2, 3, 64, 80)).items()
        if gradient is None or not gradient.any()
    ]
    assert unreached == []


@backbones
def test_train_and_eval_compute_the_same_without_drop_path(build):
    backbone = randomised(build(img_size=64))
    images = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(backbone.train()(images), backbone.eval()(images), rtol=0, atol=0)


@backbones
def test_drop_path_acts_in_training_alone(build):
    torch.manual_seed(0)
    without = randomised(build(img_size=64))
    torch.manual_seed(0)
    backbone = randomised(build(img_size=64, drop_path_rate=0.9))
    images = torch.randn(4, 3, 48, 64)
    torch.testing.assert_close(backbone.eval()(images), without(images), rtol=0, atol=0)
    assert not torch.equal(backbone.train()(images)[0], backbone(images)[0])


@backbones
def test_activation_checkpointing_changes_no_number(build):
    torch.manual_seed(0)
    plain = randomised(build(img_size=64))
    torch.manual_seed(0)
    recomputing = randomised(build(img_size=64, with_cp=True))
    images = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(
        gradients(recomputing, images), gradients(plain, images), rtol=0, atol=0
    )


def test_activation_checkpointing_repeats_drop_path():
    backbone = randomised(BACKBONES['vrwkv-small'](img_size=64, with_cp=True, drop_path_rate=0.5))
    images = torch.randn(8, 3, 32, 32, requires_grad=True)
    torch.manual_seed(1)
    loss_of(backbone(images)).backward()
    backbone.with_cp = False
    again = images.detach().clone().requires_grad_()
    torch.manual_seed(1)
    loss_of(backbone(again)).backward()
    torch.testing.assert_close(images.grad, again.grad)


@backbones
def test_backends_agree(build):
    torch.manual_seed(0)
    chosen = randomised(build(img_size=64))
    torch.manual_seed(0)
    reference = randomised(build(img_size=64, backend='reference'))
    images = torch.randn(2, 3, 64, 80)
    torch.testing.assert_close(chosen(images), reference(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(chosen, images), gradients(reference, images), rtol=1e-3, atol=1e-4
    )


@backbones
def test_autocast_to_bfloat16_stays_near_float32(build):
    backbone = randomised(build(img_size=64))
    images = torch.randn(2, 3, 64, 64)
    (expected,) = backbone(images)
    with torch.autocast('cpu', torch.bfloat16):
        (output,) = backbone(images)
    loss_of((output.float(),)).backward()
    assert (output - expected).norm() / expected.norm() < 0.03
    assert all(p.grad.dtype == torch.float32 for p in backbone.parameters())


@plain_backbones
def test_state_dict_of_another_resolution_is_resampled(build):
    small = randomised(build(img_size=64))
    large = build(img_size=(96, 160))
    large.load_state_dict(small.state_dict())
    expected = resize_position_embedding(small.pos_embed, (4, 4), (6, 10))
    torch.testing.assert_close(large.pos_embed, expected, rtol=0, atol=0)
    images = torch.randn(1, 3, 96, 160)
    torch.testing.assert_close(large(images), small(images), rtol=0, atol=0)


def test_state_dict_of_an_unknown_grid_is_refused():
    build = BACKBONES['vrwkv-tiny']
    state_dict = build(img_size=(32, 96)).state_dict()
    build(img_size=(32, 96)).load_state_dict(state_dict)
    with pytest.raises(ValueError, match=r'has 12 tokens, which is neither the grid 4 x 4'):
        build(img_size=64).load_state_dict(state_dict)


def test_resampling_needs_the_grid_of_the_tokens():
    with pytest.raises(ValueError, match='12 tokens is not a grid of 3 x 3'):
        resize_position_embedding(torch.zeros(1, 12, 8), (3, 3), (4, 4))


def test_state_dict_of_another_architecture_is_refused_even_if_not_strict():
    backbone = BACKBONES['vrwkv-small']()
    other = VRWKV({'embed_dims': 32, 'depth': DEPTH})
    with pytest.raises(CheckpointError, match=r'does not fit this VRWKV: \d+ tensors have other'):
        backbone.load_state_dict(other.state_dict(), strict=False)
    with pytest.raises(CheckpointError, match='are missing'):
        backbone.load_state_dict({'conv1.weight': torch.zeros(1)}, strict=False)


@pytest.mark.parametrize(
    ('theirs', 'ours', 'expected'),
    [
        ({'depth': 6}, {'depth': 3}, r'are unknown here \(layers\.3\.'),
        ({'depth': 4}, {'depth': 6}, r'tensors are missing \(layers\.4\.'),
        ({'depth': 2, 'key_norm': True}, {'depth': 2}, r'are unknown here \(layers\.0\.att\.key_n'),
        ({'depth': 2, 'layer_scale_init': 1.0}, {'depth': 2}, r'here \(layers\.0\.gamma1'),
    ],
    ids=['deeper', 'shallower', 'key norm', 'layer scale'],
)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_state_dict_with_other_layers_is_refused_even_if_not_strict(theirs, ours, expected, prefix):
    given = VRWKV({'embed_dims': 8, **theirs}, img_size=32).state_dict()
    given = {f'{prefix}{name}': value for name, value in given.items()}
    backbone = VRWKV({'embed_dims': 8, **ours}, img_size=32)
    model = torch.nn.ModuleDict({'backbone': backbone}) if prefix else backbone
    with pytest.raises(CheckpointError, match=expected.replace('layers', f'{prefix}layers')):
        model.load_state_dict(given, strict=False)


@backbones
def test_layer_depth_grows_from_the_input_to_the_output(build):
    backbone = build(out_indices=range(DEPTH))
    names = [f'backbone.{name}' for name, _ in backbone.named_parameters()]
    depths = {name: backbone.get_layer_depth(name, 'backbone.') for name in names}
    blocks = sum(getattr(backbone, 'depths', [DEPTH]))
    assert {count for _, count in depths.values()} == {blocks + 2}
    assert [depth for depth, _ in depths.values()] == sorted(depth for depth, _ in depths.values())
    assert {depth for depth, _ in depths.values()} == set(range(blocks + 2))
    for name, (depth, _) in depths.items():
        assert (depth == 0) == name.startswith(EMBEDDINGS)
    other = backbone.get_layer_depth('decode_head.layers.0.weight', 'backbone.')
    assert other == (blocks + 1, blocks + 2)


@backbones
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, DEPTH])
def test_frozen_stages_keep_their_mode_and_get_no_gradient(build, frozen_stages):
    backbone = build(frozen_stages=frozen_stages).train()
    # Depth 0 is the embeddings, i + 1 is layer or block i, and the final norm is the last.
    depths = getattr(backbone, 'depths', [1] * DEPTH)
    first_trained = 0 if frozen_stages < 0 else sum(depths[:frozen_stages]) + 1
    if frozen_stages == DEPTH:
        first_trained += 1
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (backbone.get_layer_depth(name)[0] >= first_trained)
    modes = [layer.training for layer in backbone.layers]
    assert modes == [index >= frozen_stages for index in range(DEPTH)]


@pytest.mark.parametrize('arch', PUBLISHED)
def test_parameters_are_those_of_the_paper(arch):
    with torch.device('meta'):
        backbone = PUBLISHED[arch].build()
    assert sum(p.numel() for p in backbone.parameters()) == PUBLISHED[arch].parameters


@pytest.mark.parametrize('arch', PUBLISHED)
def test_macs_are_those_of_the_paper(arch):
    published = PUBLISHED[arch]
    with torch.device('meta'):
        backbone = published.build()
    macs = sum(measure(backbone, published.pixels, published.pixels).macs.values())
    assert round(macs / 1e9, published.digits) == published.gmacs


@pytest.mark.parametrize('arch', ['vrwkv-tiny', 'vrwkv-large', 'vig-tiny', 'vig-hierarchical'])
def test_compiles_without_graph_breaks(arch):
    backbone: Any = randomised(BACKBONES[arch](img_size=64, out_indices=(0, -1)))
    compiled = torch.compile(backbone, backend='aot_eager', fullgraph=True)
    images = torch.randn(1, 3, 40, 64)
    torch.testing.assert_close(compiled(images), backbone(images))
    loss_of(compiled(images)).backward()
    assert next(backbone.parameters()).grad.any()


@pytest.mark.parametrize(
    ('arch', 'drop_path_rate', 'with_cp'),
    [
        ('vrwkv-tiny', 0.5, False),
        ('vrwkv-large', 0.0, True),
        ('vrwkv-small', 0.5, True),
        ('vig-hierarchical', 0.5, True),
    ],
)
def test_compiled_training_computes_the_same(arch, drop_path_rate, with_cp):
    torch._dynamo.reset()
    options = {'img_size': 64, 'drop_path_rate': drop_path_rate, 'with_cp': with_cp}
    backbone: Any = randomised(BACKBONES[arch](**options)).train()
    compiled: Any = torch.compile(backbone, backend='aot_eager', fullgraph=True)

    def gradients_of(model: Any, batch: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(batch)
        images = torch.randn(batch, 3, 32, 64)
        backbone.zero_grad()
        loss_of(model(images)).backward()
        return {name: parameter.grad for name, parameter in backbone.named_parameters()}

    # the first batch size is compiled as a constant, the second one as any size
    for batch in (4, 3):
        torch.testing.assert_close(gradients_of(compiled, batch), gradients_of(backbone, batch))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 7, 4):
            torch.testing.assert_close(gradients_of(compiled, batch), gradients_of(backbone, batch))


@pytest.mark.parametrize('grad', [False, True])
def test_compiled_evaluation_takes_any_batch(grad):
    torch._dynamo.reset()
    backbone: Any = randomised(BACKBONES['vrwkv-large'](img_size=64, drop_path_rate=0.5)).eval()
    compiled = torch.compile(backbone, backend='aot_eager', fullgraph=True)
    with torch.set_grad_enabled(grad):
        for batch in (4, 3):
            compiled(torch.randn(batch, 3, 32, 64))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (2, 7, 4):
                images = torch.randn(batch, 3, 32, 64)
                torch.testing.assert_close(compiled(images), backbone(images))


@pytest.mark.parametrize('arch', ['vrwkv-large', 'vig-hierarchical'])
def test_compiles_once_for_all_sizes(arch):
    torch._dynamo.reset()  # what other tests have compiled counts too
    backbone: Any = randomised(BACKBONES[arch](img_size=64))
    compiled = torch.compile(backbone, backend='aot_eager', fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((70, 50), (64, 64), (33, 47), (80, 96)):
            images = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(images), backbone(images))


@pytest.mark.parametrize(
    ('arch', 'traced_size'),
    [
        ('vrwkv-tiny', (64, 64)),
        ('vrwkv-large', (70, 50)),
        ('vig-tiny', (64, 64)),
        ('vig-small', (70, 50)),
        ('vig-hierarchical', (70, 50)),
    ],
)
def test_exports_with_dynamic_height_and_width(arch, traced_size):
    # the picture for which the positions are learnt, and one that needs padding and resampling
    backbone = randomised(BACKBONES[arch](img_size=64)).eval()
    sizes = {n: torch.export.Dim(name, min=17, max=1024) for n, name in ((2, 'h'), (3, 'w'))}
    program = torch.export.export(
        backbone, (torch.randn(2, 3, *traced_size),), dynamic_shapes=(sizes,)
    )
    for size in ((64, 64), (33, 47), (96, 160)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(program.module()(images), backbone(images))


@pytest.mark.parametrize('grid', [(1, 1), (4, 4), (14, 14), (7, 13)], ids=str)
def test_resampling_to_the_same_grid_changes_no_bit(grid):
    # programs for all sizes always resample
    positions = torch.randn(1, 8, *grid)
    same = F.interpolate(positions, size=grid, mode='bicubic', align_corners=False)
    assert torch.equal(same, positions)
