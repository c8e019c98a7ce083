import json
from pathlib import Path

import numpy as np
import pytest
import torch

from linvis.models import VRWKV, ViG, ViGHierarchical
from tools.analysis.check_parity import (
    build_vig,
    build_vig_hierarchical,
    build_vrwkv,
    compute,
    main,
    parameter_values,
    picture,
)

CASES = Path(__file__).parents[3] / 'shared' / 'golden' / 'cases'
KWARGS = {'img_size': 32, 'patch_size': 16, 'embed_dims': 16, 'depth': 2, 'post_norm': True}


@pytest.fixture
def meta():
    """A case of a picture whose size is neither a multiple of the patch nor that of the model."""
    backbone = VRWKV({'embed_dims': 16, 'depth': 2, 'post_norm': True}, img_size=32)
    return {
        'case': 'small',
        'family': 'vrwkv',
        'kwargs': KWARGS | {'init_mode': 'fancy', 'out_indices': [0, 1]},
        'manifest': {name: list(value.shape) for name, value in backbone.state_dict().items()},
        'grad_names': [name for name, _ in backbone.named_parameters()],
        'batch': 2,
        'height': 40,
        'width': 48,
        'image_seed': 5,
    }


def write(path: Path, meta: dict, arrays: dict[str, np.ndarray]) -> str:
    np.savez(path, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    return str(path)


def run(monkeypatch, *cases: str) -> int:
    monkeypatch.setattr('sys.argv', ['check_parity.py', *cases])
    return main()


def independent_arrays(meta: dict) -> dict[str, np.ndarray]:
    """The arrays of a case, by a model that gets its weights directly."""
    backbone = VRWKV(
        {'embed_dims': 16, 'depth': 2, 'post_norm': True}, img_size=32, out_indices=(0, 1)
    )
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(torch.from_numpy(parameter_values(name, parameter.shape)))
    images = picture(2, 40, 48, 5).requires_grad_()
    outputs = backbone(images)
    loss = sum((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() for y in outputs)
    loss.backward()
    return {
        'out0': outputs[0].detach().numpy(),
        'out1': outputs[1].detach().numpy(),
        'loss': loss.detach().numpy(),
        'grad_input': images.grad.numpy(),
        'grad_norms': np.array([p.grad.norm().item() for p in backbone.parameters()]),
    }


def test_equal_arrays_pass_with_a_line_each(tmp_path, meta, monkeypatch, capsys):
    case = write(tmp_path / 'small.npz', meta, independent_arrays(meta))
    assert run(monkeypatch, case, case) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = ['out0', 'out1', 'loss', 'grad_input', 'grad_norms']
    assert [line[1] for line in lines] == 2 * names
    assert all(line[0] == 'small' and line[3:] == ['2e-04', 'PASS'] for line in lines)
    assert all(float(line[2]) < 1e-5 for line in lines)


@pytest.mark.parametrize('name', ['out1', 'loss', 'grad_input', 'grad_norms'])
def test_one_array_beyond_the_bound_fails(tmp_path, meta, monkeypatch, capsys, name):
    arrays = independent_arrays(meta)
    arrays[name] = arrays[name] * 1.001
    assert run(monkeypatch, write(tmp_path / 'small.npz', meta, arrays)) == 1
    verdicts = {line.split()[1]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert [key for key, verdict in verdicts.items() if verdict == 'FAIL'] == [name]


def test_arrays_that_the_model_does_not_give_or_that_are_nan_fail(
    tmp_path, meta, monkeypatch, capsys
):
    arrays = {'out0': np.full((2, 16, 3, 3), np.nan, np.float32), 'out7': np.zeros(3)}
    assert run(monkeypatch, write(tmp_path / 'small.npz', meta, arrays)) == 1
    assert capsys.readouterr().out.count('FAIL') == 2


def test_unknown_family_is_named(tmp_path, meta, monkeypatch, capsys):
    case = write(tmp_path / 'small.npz', meta | {'family': 'mamba'}, {})
    assert run(monkeypatch, case) == 1
    printed = capsys.readouterr()
    assert "The family 'mamba' of case small is unknown; known are vrwkv" in printed.err
    assert printed.out == 'small - - - FAIL\n'


@pytest.mark.parametrize(
    ('name', 'told'),
    [
        ('empty', 'it is no whole .npz file'),
        ('text', 'it is no whole .npz file'),
        ('cut', 'it is no whole .npz file'),
        ('changed', 'it is no whole .npz file'),
        ('array', 'it is no whole .npz file'),
        ('bare', "it lacks the entry 'meta'"),
        ('list', 'its meta must be an object'),
        ('part', 'its meta lacks kwargs, batch.'),
        ('norms', 'its meta lacks grad_names.'),
        ('vir', 'its meta lacks retention.'),
        ('softmax', "mode must be one of parallel, recurrent, chunkwise, got 'softmax'."),
    ],
)
def test_broken_case_is_told_and_the_others_are_checked(
    tmp_path, meta, monkeypatch, capsys, name, told
):
    arrays = independent_arrays(meta)
    good = write(tmp_path / 'small.npz', meta, arrays)
    content = Path(good).read_bytes()
    broken = tmp_path / f'{name}.npz'
    files = {
        'empty': b'',
        'text': b'text',
        'cut': content[: len(content) // 2],
        'changed': content[:4000] + bytes(100) + content[4100:],
    }
    metas = {
        'list': ['small'],
        'part': {key: value for key, value in meta.items() if key not in ('kwargs', 'batch')},
        'norms': {key: value for key, value in meta.items() if key != 'grad_names'},
        'vir': meta | {'family': 'vir'},
        'softmax': meta | {'family': 'vir', 'retention': '1d', 'mode': 'softmax'},
    }
    if name in files:
        broken.write_bytes(files[name])
    elif name == 'array':
        with broken.open('wb') as file:
            np.save(file, np.zeros(3))
    elif name == 'bare':
        np.savez(broken, **arrays)
    else:
        write(broken, metas[name], arrays)
    assert run(monkeypatch, str(broken), good) == 1
    printed = capsys.readouterr()
    assert f'{broken}: {told}' in printed.err
    assert len(printed.err.splitlines()) == 1
    first, *others = printed.out.splitlines()
    assert first == f'{name} - - - FAIL'
    assert len(others) == len(arrays)
    assert all(line.endswith(' PASS') for line in others)


def test_case_that_breaks_the_tool_does_not_stop_it(tmp_path, meta, monkeypatch, capsys):
    arrays = independent_arrays(meta)
    odd = write(tmp_path / 'odd.npz', meta | {'grad_names': ['unknown']}, arrays)
    assert run(monkeypatch, odd, write(tmp_path / 'small.npz', meta, arrays)) == 1
    printed = capsys.readouterr()
    assert "KeyError: 'unknown'" in printed.err
    assert printed.out.startswith('odd - - - FAIL\nsmall out0 ')
    assert printed.out.count('PASS') == len(arrays)


@pytest.mark.parametrize(
    ('device', 'told'),
    [
        ('gpu', '--device takes auto, cpu, cuda or cuda:N, got gpu.'),
        ('cuda', '--device cuda: PyTorch '),
    ],
)
def test_device_that_is_not_there_is_told(tmp_path, monkeypatch, capsys, device, told):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert run(monkeypatch, str(tmp_path / 'none.npz'), '--device', device) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f'check_parity.py: {told}')
    assert not printed.out


def test_missing_case_is_named(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, str(tmp_path / 'none.npz')) == 1
    printed = capsys.readouterr()
    assert 'none.npz' in printed.err
    assert printed.out == 'none - - - FAIL\n'


def test_checkpoint_of_another_layout_is_told(meta):
    meta['manifest']['layers.0.gamma1'] = [16]
    with pytest.raises(ValueError, match=r'1 are unknown here \(layers\.0\.gamma1\)'):
        compute(meta, with_gradients=False, device='cpu')


def test_arguments_of_the_authors_are_translated():
    backbone = build_vrwkv(
        KWARGS | {'init_values': 1e-5, 'key_norm': True, 'out_indices': [1], 'with_cp': True}
    )
    layer = backbone.layers[0]
    assert layer.post_norm
    assert layer.gamma1[0].item() == pytest.approx(1e-5)
    assert layer.att.key_norm.normalized_shape == (16,)
    with pytest.raises(ValueError, match="shift_mode must be 'q_shift', got 'shift_1d'"):
        build_vrwkv(KWARGS | {'shift_mode': 'shift_1d'})
    with pytest.raises(ValueError, match='The argument window=7 of a vrwkv case is unknown'):
        build_vrwkv(KWARGS | {'window': 7})


STAGES = {'embed_dims': 8, 'depths': (1, 1), 'num_heads': (1, 2)}
HIERARCHICAL_KWARGS = {'dims': 8, 'depths': [1, 1], 'num_heads': [1, 2], 'num_classes': 5}


def classifier_case() -> tuple[dict, dict[str, np.ndarray]]:
    """A case of ViG-H with its head, computed without the tool's loading and building."""
    backbone = ViGHierarchical(STAGES)
    names = {name: name.replace('outnorm1', 'classifier.norm') for name in backbone.state_dict()}
    shapes = {names[name]: list(value.shape) for name, value in backbone.state_dict().items()}
    shapes |= {'classifier.head.weight': [5, 16], 'classifier.head.bias': [5]}
    head = torch.nn.Linear(16, 5)
    parameters = {names[name]: value for name, value in backbone.named_parameters()}
    parameters |= {f'classifier.head.{name}': value for name, value in head.named_parameters()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(parameter_values(name, parameter.shape)))
    images = picture(2, 40, 48, 5).requires_grad_()
    logits = head(backbone(images)[0].mean((2, 3)))
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    loss.backward()
    meta = {
        'case': 'small',
        'family': 'vig_h',
        'kwargs': HIERARCHICAL_KWARGS | {'gmlp': True, 'norm_layer': 'ln2d'},
        'manifest': shapes,
        'grad_names': list(parameters),
        'batch': 2,
        'height': 40,
        'width': 48,
        'image_seed': 5,
    }
    arrays = {
        'out0': logits.detach().numpy(),
        'loss': loss.detach().numpy(),
        'grad_input': images.grad.numpy(),
        'grad_norms': np.array([p.grad.norm().item() for p in parameters.values()]),
    }
    return meta, arrays


def test_classifier_under_the_names_of_the_authors_passes(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, write(tmp_path / 'small.npz', *classifier_case())) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ['out0', 'loss', 'grad_input', 'grad_norms']
    assert all(float(line[2]) < 1e-5 for line in lines)


def test_gradients_are_matched_by_name(tmp_path, monkeypatch, capsys):
    meta, arrays = classifier_case()
    meta['grad_names'].reverse()
    assert run(monkeypatch, write(tmp_path / 'small.npz', meta, arrays)) == 1
    arrays['grad_norms'] = arrays['grad_norms'][::-1]
    assert run(monkeypatch, write(tmp_path / 'small.npz', meta, arrays)) == 0


def test_arguments_of_vig_are_translated():
    kwargs = {'embed_dim': 16, 'depth': 1, 'num_heads': 2, 'patch_embed_version': 'v2'}
    backbone = build_vig(kwargs | {'num_classes': 0, 'img_size': 32, 'classification_mode': 'feat'})
    assert isinstance(backbone, ViG)
    assert (backbone.out_type, backbone.pos_grid) == ('featmap', (2, 2))
    mixer = backbone.layers[0].attn
    assert isinstance(mixer.in_proj[1], torch.nn.SiLU)
    assert isinstance(mixer.out_act, torch.nn.Identity)
    classifier = build_vig(kwargs | {'use_act_in_conv': False, 'use_out_act': True})
    mixer = classifier.backbone.layers[0].attn
    assert isinstance(mixer.in_proj[1], torch.nn.Identity)
    assert isinstance(mixer.out_act, torch.nn.SiLU)
    assert classifier(torch.zeros(2, 3, 32, 32))[0].shape == (2, 1000)
    with pytest.raises(ValueError, match='if_cls_token must be False, got True'):
        build_vig(kwargs | {'if_cls_token': True})
    with pytest.raises(ValueError, match="one of feat, avgpool, got 'mid_clstok'"):
        build_vig(kwargs | {'classification_mode': 'mid_clstok'})
    with pytest.raises(ValueError, match='The argument window=7 of a vig case is unknown'):
        build_vig(kwargs | {'window': 7})


def test_arguments_of_hierarchical_vig_are_translated():
    kwargs = {**HIERARCHICAL_KWARGS, 'dims': [8, 16]}
    backbone = build_vig_hierarchical(kwargs, with_classes=False)
    assert (backbone.out_indices, backbone.out_channels) == ((0, 1), (8, 16))
    backbone = build_vig_hierarchical(kwargs | {'out_indices': [1]}, with_classes=False)
    assert backbone.out_indices == (1,)
    classifier = build_vig_hierarchical(kwargs, with_classes=True)
    assert classifier.head.fc.out_features == 5
    with pytest.raises(ValueError, match="norm_layer must be 'ln2d', got 'bn'"):
        build_vig_hierarchical(kwargs | {'norm_layer': 'bn'}, with_classes=True)


@pytest.mark.skipif(not CASES.is_dir(), reason='no recorded cases')
@pytest.mark.parametrize('family', ['vrwkv_tiny', 'vig'])
def test_recorded_cases_pass(monkeypatch, family):
    assert run(monkeypatch, *map(str, sorted(CASES.glob(f'{family}*.npz')))) == 0
