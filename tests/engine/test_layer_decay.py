import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Backbone(nn.Module):
    """Two layers between an embedding and a final norm: depths 0, 1, 2, 3 of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.decay = nn.Parameter(torch.ones(4))
        self.norm = nn.LayerNorm(4)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        name = param_name.removeprefix(prefix)
        if not param_name.startswith(prefix):
            return 3, 4
        if name.startswith(('embed', 'decay')):
            return 0, 4
        return (int(name.split('.')[1]) + 1, 4) if name.startswith('layers') else (3, 4)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(4, 2)


def build(model: nn.Module, **paramwise: object) -> dict[str, dict]:
    """Builds the optimizer and returns the group of every parameter by its name."""
    wrapper = build_optim_wrapper(
        model,
        {
            'constructor': 'linvis.LayerDecayOptimWrapperConstructor',
            'optimizer': {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.1},
            'paramwise_cfg': {'layer_decay_rate': 0.5, **paramwise},
        },
    )
    module = getattr(model, 'module', model)
    names = {id(param): name for name, param in module.named_parameters()}
    return {
        names[id(param)]: group
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }


def test_layers_learn_slower_towards_the_input():
    groups = build(Detector())
    lr = {name: group['lr'] for name, group in groups.items()}
    assert lr['backbone.embed.weight'] == pytest.approx(1e-3 / 8)
    assert lr['backbone.layers.0.weight'] == pytest.approx(1e-3 / 4)
    assert lr['backbone.layers.1.weight'] == pytest.approx(1e-3 / 2)
    assert lr['backbone.norm.weight'] == pytest.approx(1e-3)
    assert lr['head.weight'] == pytest.approx(1e-3)


def test_every_parameter_is_in_one_group():
    model = Detector()
    assert set(build(model)) == {name for name, _ in model.named_parameters()}


def test_weight_decay_follows_the_options():
    groups = build(Detector(), norm_decay_mult=0.0, bias_decay_mult=0.5, flat_decay_mult=0.2)
    decay = {name: group['weight_decay'] for name, group in groups.items()}
    assert decay['backbone.norm.weight'] == decay['backbone.norm.bias'] == 0.0
    assert decay['head.bias'] == pytest.approx(0.05)
    assert decay['backbone.decay'] == pytest.approx(0.02)
    assert decay['head.weight'] == pytest.approx(0.1)


def test_longest_custom_key_counts():
    keys = {'backbone': {'decay_mult': 0.3}, 'backbone.embed': {'decay_mult': 0.0, 'lr_mult': 2.0}}
    groups = build(Detector(), custom_keys=keys, bias_decay_mult=0.5)
    assert groups['backbone.embed.bias']['weight_decay'] == 0.0
    assert groups['backbone.embed.bias']['lr'] == pytest.approx(2e-3 / 8)
    assert groups['backbone.layers.0.bias']['weight_decay'] == pytest.approx(0.03)
    assert groups['head.bias']['weight_decay'] == pytest.approx(0.05)


def test_frozen_and_shared_parameters_are_skipped():
    model = Detector()
    model.backbone.embed.requires_grad_(False)
    model.head.weight = model.backbone.layers[0].weight
    groups = build(model)
    assert not any(name.startswith('backbone.embed') for name in groups)
    assert groups['backbone.layers.0.weight']['lr'] == pytest.approx(1e-3 / 4)


def test_distributed_wrapper_is_looked_through(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        groups = build(DistributedDataParallel(Detector()))
    finally:
        torch.distributed.destroy_process_group()
    assert groups['backbone.embed.weight']['lr'] == pytest.approx(1e-3 / 8)


def test_scheduler_keeps_the_ratio_of_rates():
    from mmengine.optim import LinearLR

    model = Detector()
    wrapper = build_optim_wrapper(
        model,
        {
            'constructor': 'linvis.LayerDecayOptimWrapperConstructor',
            'optimizer': {'type': 'AdamW', 'lr': 1e-3},
            'paramwise_cfg': {'layer_decay_rate': 0.5},
        },
    )
    LinearLR(wrapper, start_factor=0.1, end=10, by_epoch=False)
    rates = sorted({group['lr'] for group in wrapper.optimizer.param_groups})
    assert rates == pytest.approx([1e-4 / 8, 1e-4 / 4, 1e-4 / 2, 1e-4])


def test_table_of_groups_is_logged(capsys):
    from mmengine.logging import MMLogger

    MMLogger.get_instance('layer_decay_test')
    build(Detector())
    assert 'Layer-wise learning rates' in capsys.readouterr().out


def test_backbone_without_depths_is_refused():
    model = Detector()
    model.backbone = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=r'Detector\.backbone is Linear'):
        build(model)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [({'layer_decay': 0.5}, 'got layer_decay'), ({'layer_decay_rate': 1.5}, r'\(0, 1\], got 1.5')],
)
def test_bad_option_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        build(Detector(), **options)


@pytest.mark.parametrize('kind', ['VRWKV'])
def test_backbones_of_linvis_give_depths(kind):
    from linvis.registry import MODELS

    model = nn.Module()
    model.backbone = MODELS.build({'type': f'linvis.{kind}', 'arch': 'tiny'})
    model.head = nn.Linear(4, 2)
    groups = build(model)
    scales = sorted({group['lr_scale'] for group in groups.values()})
    assert scales == pytest.approx([0.5**power for power in range(13, -1, -1)])
    assert groups['head.weight']['lr_scale'] == 1.0
