import argparse
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner import load_checkpoint as load_by_mmengine
from torch import nn
from torch.utils.data import Dataset

from linvis.models import VRWKV
from linvis.utils.checkpoint import (
    CheckpointError,
    LoadReport,
    find_state_dict,
    load_checkpoint,
    load_from_url,
    load_state_dict_into,
    register_safe_loader,
)

ARCH = {'embed_dims': 8, 'depth': 2}


@pytest.fixture
def safe_loader(monkeypatch):
    """The loader in place for one test."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    register_safe_loader()


@pytest.fixture
def weights():
    return VRWKV(ARCH, img_size=32).state_dict()


class Touch:
    """Its pickle creates a file when it is loaded without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f'touch {self.canary}',)


class GetAttr(Touch):
    """The first step of the same through getattr, which pickles of logged scalars name too."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert '\n' not in message
    return message


def test_round_trip_of_tensors_and_records(tmp_path, weights):
    history = HistoryBuffer()
    history.update(np.float64(1.0))
    history.update(3.0)
    torch.save(
        {
            'state_dict': weights,
            'meta': {
                'seed': np.int64(3),
                'dataset_meta': {'classes': ('a', 'b'), 'palette': np.zeros((2, 3), np.uint8)},
            },
            'message_hub': {'log_scalars': OrderedDict(loss=history)},
            'args': argparse.Namespace(lr=0.1),
        },
        tmp_path / 'last.pth',
    )
    checkpoint = load_checkpoint(tmp_path / 'last.pth')
    torch.testing.assert_close(dict(find_state_dict(checkpoint)), dict(weights), rtol=0, atol=0)
    assert checkpoint['meta']['seed'] == 3
    assert checkpoint['meta']['dataset_meta']['palette'].dtype == np.uint8
    loaded = checkpoint['message_hub']['log_scalars']['loss']
    assert loaded.mean() == loaded.statistics('mean') == 2.0
    assert checkpoint['args'].lr == 0.1


def test_config_objects_of_yacs_become_plain_dicts(tmp_path, weights, monkeypatch):
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    torch.save({'model': weights, 'config': module.CfgNode(LR=0.1)}, tmp_path / 'official.pth')
    monkeypatch.delitem(sys.modules, 'yacs.config')
    assert load_checkpoint(tmp_path / 'official.pth')['config'] == {'LR': 0.1}


@pytest.mark.parametrize('attack', [Touch, GetAttr])
@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_code_in_a_checkpoint_is_refused_by_name_and_never_runs(tmp_path, weights, attack, legacy):
    path, canary = tmp_path / 'evil.pth', tmp_path / 'canary'
    torch.save(
        {'state_dict': weights, 'meta': attack(canary)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    message = error_of(path)
    assert 'system' in message or 'getattr' in message or 'posix' in message
    assert not canary.exists()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickle_is_refused(tmp_path, protocol):
    path, canary = tmp_path / 'evil.pkl', tmp_path / 'canary'
    path.write_bytes(pickle.dumps({'state_dict': Touch(canary)}, protocol))
    message = error_of(path)
    assert 'was refused because it' in message
    assert 'download' not in message
    assert not canary.exists()


def test_missing_file_is_named(tmp_path):
    assert 'There is no checkpoint file' in error_of(tmp_path / 'none.pth')
    assert 'There is no checkpoint file' in error_of(tmp_path)


@pytest.mark.parametrize(
    'content',
    [b'', b'epoch 1 loss 0.3\n' * 9, b'\xff\xd8\xff\xe0' + bytes(99), b'<!DOCTYPE html>'],
    ids=['empty', 'text', 'jpeg', 'web page'],
)
def test_other_files_are_no_checkpoints(tmp_path, content):
    path = tmp_path / 'other.pth'
    path.write_bytes(content)
    assert 'is no checkpoint file' in error_of(path)


def test_zip_of_something_else_is_no_checkpoint(tmp_path):
    path = tmp_path / 'photos.pth'
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('readme.txt', 'hello')
    assert 'no checkpoint' in error_of(path)


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.99])
def test_truncated_file_is_told(tmp_path, weights, legacy, share):
    path = tmp_path / 'whole.pth'
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert 'truncated' in error_of(path)


def test_safetensors_are_read_or_the_package_is_named(tmp_path, weights):
    path = tmp_path / 'weights.safetensors'
    try:
        from safetensors.torch import save_file
    except ImportError:
        path.write_bytes(bytes(16))
        assert 'pip install safetensors' in error_of(path)
        return
    save_file(dict(weights), path)
    torch.testing.assert_close(load_checkpoint(path), dict(weights))


@pytest.mark.parametrize(
    'content', [{'meta': {'epoch': 3}}, {'state_dict': {}}, [torch.zeros(3)]], ids=str
)
def test_file_without_weights_is_refused(tmp_path, content):
    path = tmp_path / 'none.pth'
    torch.save(content, path)
    assert 'state dict' in error_of(path)


@pytest.mark.parametrize('key', ['state_dict', 'model', 'model_ema', 'state_dict_ema', None])
def test_state_dict_is_found_under_its_usual_names(key, weights):
    assert find_state_dict(weights if key is None else {key: weights, 'epoch': 3}) is weights


def test_trained_weights_come_before_averaged_ones(weights):
    averaged = {'layer': torch.zeros(1)}
    assert find_state_dict({'model_ema': averaged, 'model': weights}) is weights


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.', 'module.backbone.'])
def test_prefixes_and_the_head_are_left_out(tmp_path, weights, prefix):
    path = tmp_path / 'authors.pth'
    named = {f'{prefix}{name}': value for name, value in weights.items()}
    if 'backbone' in prefix:
        named['head.fc.weight'] = torch.zeros(10, 8)
    torch.save({'model': named}, path)
    backbone = VRWKV(ARCH, img_size=64)
    assert load_state_dict_into(backbone, path) == LoadReport([], [])
    torch.testing.assert_close(
        backbone.layers[1].att.key.weight, weights['layers.1.att.key.weight']
    )


def test_other_architecture_is_told_in_one_sentence_with_examples(weights):
    for arch in ({'embed_dims': 16, 'depth': 2}, {'embed_dims': 8, 'depth': 9}):
        with pytest.raises(CheckpointError) as caught:
            load_state_dict_into(VRWKV(arch), weights, strict=False)
        assert len(str(caught.value)) < 500
    with pytest.raises(CheckpointError, match=r'1 of \d+ tensors are missing \(fc\.bias\); choose'):
        load_state_dict_into(
            nn.ModuleDict({'fc': nn.Linear(2, 2)}), {'fc.weight': torch.ones(2, 2)}
        )
    with pytest.raises(CheckpointError, match=r'\(weight is \(3, 2\) there, \(2, 2\) here\)'):
        load_state_dict_into(nn.Linear(2, 2), {'weight': torch.ones(3, 2)}, strict=False)


def test_leftovers_are_reported_if_not_strict(weights):
    scaled = VRWKV({**ARCH, 'layer_scale_init': 1.0})
    report = load_state_dict_into(scaled, {**weights, 'extra': torch.zeros(1)}, strict=False)
    gammas = [f'layers.{i}.gamma{j}' for i in (0, 1) for j in (1, 2)]
    assert report == LoadReport(missing=gammas, unexpected=['extra'])
    with pytest.raises(CheckpointError, match=r'4 of \d+ tensors are missing'):
        load_state_dict_into(scaled, weights)


def test_pretrained_init_reads_the_authors_files(tmp_path, weights, safe_loader):
    path = str(tmp_path / 'authors.pth')
    named = {f'backbone.{name}': value + 1 for name, value in weights.items()}
    torch.save({'model': named | {'head.fc.weight': torch.zeros(10, 8)}}, path)
    init_cfg = {'type': 'Pretrained', 'checkpoint': path, 'prefix': 'backbone.'}
    backbone = VRWKV(ARCH, img_size=32, init_cfg=init_cfg)
    backbone.init_weights()
    torch.testing.assert_close(backbone.ln1.weight, weights['ln1.weight'] + 1)

    backbone = VRWKV(ARCH, init_cfg={'type': 'Pretrained', 'checkpoint': path})
    with pytest.raises(CheckpointError, match=r"strip a prefix \(prefix='backbone\.'\)"):
        backbone.init_weights()


def test_whole_model_is_loaded_by_mmengine(tmp_path, weights, safe_loader):
    path = str(tmp_path / 'authors.pth')
    model = nn.ModuleDict({'backbone': VRWKV(ARCH, img_size=64), 'head': nn.Linear(8, 10)})
    named = {f'module.backbone.{name}': value + 1 for name, value in weights.items()}
    torch.save({'model': named | {'module.head.weight': torch.ones(10, 8)}}, path)
    load_by_mmengine(model, path)
    torch.testing.assert_close(model['backbone'].ln1.weight, weights['ln1.weight'] + 1)
    assert (model['head'].weight == 1).all()


def test_code_never_runs_through_mmengine(tmp_path, weights, safe_loader):
    path, canary = tmp_path / 'evil.pth', tmp_path / 'canary'
    torch.save({'state_dict': weights, 'meta': Touch(canary)}, path)
    with pytest.raises(CheckpointError, match='pickled code'):
        load_by_mmengine(VRWKV(ARCH), str(path))
    assert not canary.exists()


def test_records_of_other_forms_are_left_alone(tmp_path, weights, safe_loader):
    path = str(tmp_path / 'odd.pth')
    torch.save({'model': weights, 'meta': 'epoch 3', 'message_hub': {'runtime_info': None}}, path)
    assert CheckpointLoader.load_checkpoint(path)['meta'] == 'epoch 3'


@pytest.mark.parametrize('url', ['s3://bucket/a.pth', 'petrel://a.pth', 'pavi://a.pth'])
def test_object_stores_are_refused(url, safe_loader):
    with pytest.raises(CheckpointError, match='copy it to a local file'):
        CheckpointLoader.load_checkpoint(url)


def test_urls_are_read_safely(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, 'download_url_to_file', lambda _, path: torch.save(weights, path)
    )
    checkpoint = load_from_url('https://example.org/files/tiny.pth?download=1')
    assert checkpoint['state_dict'].keys() == weights.keys()
    assert (tmp_path / 'checkpoints' / 'tiny.pth').exists()


class Pairs(Dataset):
    metainfo: ClassVar = {'classes': ('a', 'b'), 'palette': np.zeros((2, 3), np.uint8)}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {'inputs': torch.full((3,), float(index))}


class Regressor(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, inputs, mode='tensor'):
        return {'loss': self.fc(torch.stack(inputs)).square().mean()}


def runner(work_dir: Path, **kwargs) -> Runner:
    torch.manual_seed(0)
    return Runner(
        model=Regressor(),
        work_dir=str(work_dir),
        train_dataloader={
            'dataset': Pairs(),
            'batch_size': 2,
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
            'collate_fn': {'type': 'pseudo_collate'},
        },
        train_cfg={'by_epoch': True, 'max_epochs': kwargs.pop('max_epochs', 1)},
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.1}},
        param_scheduler=[{'type': 'LinearLR', 'start_factor': 0.1, 'end': 4, 'by_epoch': False}],
        randomness={'seed': 1},
        experiment_name=str(work_dir),
        **kwargs,
    )


def test_runs_of_mmengine_resume(tmp_path, safe_loader):
    straight = runner(tmp_path / 'straight', max_epochs=2)
    straight.train()
    runner(tmp_path / 'halved').train()
    path = tmp_path / 'halved' / 'epoch_1.pth'
    resumed = runner(tmp_path / 'resumed', max_epochs=2, load_from=str(path), resume=True)
    resumed.train()
    assert resumed.iter == straight.iter == 4
    torch.testing.assert_close(resumed.model.state_dict(), straight.model.state_dict())
    losses = resumed.message_hub.get_scalar('train/loss').data[0]
    np.testing.assert_allclose(losses, straight.message_hub.get_scalar('train/loss').data[0])


def test_config_text_in_a_checkpoint_never_runs_on_resume(tmp_path, safe_loader):
    runner(tmp_path / 'first').train()
    path, canary = tmp_path / 'first' / 'epoch_1.pth', tmp_path / 'canary'
    code = f'import os\nos.system("touch {canary}")\n'
    checkpoint = load_checkpoint(path)
    checkpoint['meta'] |= {'config': code, 'cfg': code}
    checkpoint['message_hub']['runtime_info']['cfg'] = code
    checkpoint['message_hub']['resumed_keys']['cfg'] = True
    torch.save(checkpoint, path)
    resumed = runner(tmp_path / 'second', max_epochs=2, load_from=str(path), resume=True)
    resumed.train()
    assert not canary.exists()
    assert code not in resumed.message_hub.runtime_info.values()
