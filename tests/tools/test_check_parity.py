import json
from pathlib import Path

import numpy as np
import pytest
import torch

from linvis.models import VRWKV
from tools.analysis.check_parity import build_vrwkv, compute, main, parameter_values, picture

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


@pytest.mark.skipif(not CASES.is_dir(), reason='no recorded cases')
def test_recorded_cases_pass(monkeypatch):
    assert run(monkeypatch, *map(str, sorted(CASES.glob('vrwkv_tiny*.npz')))) == 0
