"""Every mistake of a user gives one sentence on stderr and a non-zero status, no traceback."""

import importlib.metadata
import json
import pickle
from pathlib import Path

import pytest
import torch

from linvis.engine import devices, launch


class Payload:
    def __reduce__(self):
        return Path.touch, (Path('canary'),)


@pytest.fixture
def sentence(capsys):
    """What the command wrote to stderr, checked to be one line."""

    def read() -> str:
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        own = [line for line in lines if ' - WARNING - ' not in line and 'Warning' not in line]
        assert not any('Traceback' in line for line in lines)
        assert len(own) == 1, own
        return own[0]

    return read


@pytest.fixture
def checkpoint(toy_folder):
    """A checkpoint of the toy model, without running a training."""
    model = {
        'backbone.weight': torch.ones(8, 4),
        'backbone.bias': torch.zeros(8),
        **{f'norm.{name}': torch.ones(8) for name in ('weight', 'bias', 'running_var')},
        'norm.running_mean': torch.zeros(8),
        'head.weight': torch.ones(1, 8),
        'head.bias': torch.zeros(1),
    }
    torch.save({'state_dict': model, 'meta': {}}, 'toy.pth')
    return model


def test_missing_config_names_near_ones(run_train, sentence):
    Path('configs/vrwkv').mkdir(parents=True)
    Path('configs/vrwkv/vrwkv-tiny_8xb128-300e_in1k.py').touch()
    assert run_train(config='configs/vrwkv/vrwkv-tiny_16xb64-300e_in1k.py') == 1
    text = sentence()
    assert 'does not exist. Did you mean configs/vrwkv/vrwkv-tiny_8xb128-300e_in1k.py?' in text


def test_missing_config_names_no_unrelated_ones(run_train, sentence):
    Path('configs/vrwkv').mkdir(parents=True)
    Path('configs/vrwkv/vrwkv-tiny_16xb64-300e_in1k.py').touch()
    assert run_train(config='configs/vrwkv/deit-tiny_16xb256_in1k.py') == 1
    assert sentence().endswith('deit-tiny_16xb256_in1k.py does not exist.')


def test_folder_as_config_is_refused(run_train, sentence, tmp_path):
    assert run_train(config=str(tmp_path)) == 1
    assert 'is a folder, not a file' in sentence()


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('model = dict(', 'SyntaxError'),
        ("_base_ = './absent.py'", 'absent.py'),
        ("_base_ = 'mmdet::_base_/absent.py'", 'absent.py'),
        ("custom_imports = dict(imports=['no_such_module'])", 'no_such_module'),
        ('x = 1', 'has no `model`'),
        ("model = dict(type='ToyModel')", 'it lacks train_dataloader, train_cfg, optim_wrapper'),
    ],
    ids=['syntax', 'base', 'scoped-base', 'import', 'no-model', 'no-training'],
)
def test_unusable_config_is_explained(run_train, sentence, text, expected):
    Path('broken.py').write_text(text)
    assert run_train(config='broken.py') == 1
    assert expected in sentence()


def test_config_of_unknown_kind_is_refused(run_train, sentence):
    Path('config.txt').touch()
    assert run_train(config='config.txt') == 1
    assert 'expected .py, .yaml or .json' in sentence()


def test_missing_library_comes_with_the_command(run_train, sentence, monkeypatch):
    find_spec = launch.configs.importlib.util.find_spec

    def without_mmdet(name, *rest):
        return None if name == 'mmdet' else find_spec(name, *rest)

    monkeypatch.setattr(launch.configs.importlib.util, 'find_spec', without_mmdet)
    assert run_train('--cfg-options', 'default_scope=mmdet') == 1
    assert 'pip install --no-deps onedl-mmdetection' in sentence()


@pytest.mark.parametrize(
    ('option', 'expected'),
    [
        ('max_epochs', 'takes KEY=VALUE'),
        ('trian_cfg.max_epochs=1', 'did you mean train_cfg?'),
        ('param_scheduler.7.gamma=1', 'cannot be merged'),
        ('train_cfg.max_epochs=[1,(2]', 'cannot be merged'),
        ('model.type=ToyMdoel', 'ToyMdoel is not a known model'),
        ('model.widht=4', 'model (ToyModel) has no widht (did you mean width?)'),
        ('train_dataloader.batchsize=4', 'has no batchsize (did you mean batch_size?)'),
        ('optim_wrapper.optimizer.type=AdamV', 'there is no optimizer AdamV (did you mean Adam'),
    ],
)
def test_bad_option_is_explained(run_train, sentence, option, expected):
    assert run_train('--cfg-options', option) == 1
    assert expected in sentence()


def test_argument_in_the_config_that_its_class_does_not_have_is_named(run_train, sentence):
    text = Path('config.py').read_text()
    Path('wrong.py').write_text(text.replace("type='ToyModel'", "type='ToyModel', widht=4"))
    assert run_train(config='wrong.py') == 1
    # Python 3.13 words the hint itself
    text = sentence().replace(". Did you mean 'width'?", ' (did you mean width?)')
    assert "unexpected keyword argument 'widht' (did you mean width?): check the config." in text


def test_argument_that_is_missing_is_named(run_train, sentence):
    text = Path('config.py').read_text()
    Path('wrong.py').write_text(text.replace('milestones=[1, 2], ', ''))
    assert run_train(config='wrong.py') == 1
    assert "missing 1 required positional argument: 'milestones': check the config." in sentence()


def test_good_options_are_merged(toy_folder):
    cfg = launch.configs.load_config(
        'config.py', ['train_cfg.max_epochs=5', 'val_dataloader.batch_size=2']
    )
    assert (cfg.train_cfg.max_epochs, cfg.val_dataloader.batch_size) == (5, 2)


def test_missing_data_folder_is_named(run_train, sentence):
    dataset = 'train_dataloader.dataset'
    options = [f'{dataset}.type=mmdet.CocoDataset', f'{dataset}.data_root=data/coco']
    assert run_train('--cfg-options', *options) == 1
    assert 'data/coco is not a folder' in sentence()


def test_empty_data_folder_is_named(run_train, sentence):
    Path('data/imagenet/train').mkdir(parents=True)
    dataset = 'train_dataloader.dataset'
    options = [f'{dataset}.type=mmpretrain.ImageNet', f'{dataset}.data_root=data/imagenet']
    assert run_train('--cfg-options', *options, f'{dataset}.split=train') == 1
    assert 'data/imagenet/train has no files' in sentence()


def test_annotation_without_keys_is_named(run_train, sentence):
    Path('coco/pictures').mkdir(parents=True)
    Path('coco/pictures/a.jpg').touch()
    Path('coco/a.json').write_text(json.dumps({'images': []}))
    dataset = 'train_dataloader.dataset'
    settings = {'type': 'mmdet.CocoDataset', 'data_root': 'coco', 'ann_file': 'a.json'}
    options = [f'{dataset}.{key}={value}' for key, value in settings.items()]
    assert run_train('--cfg-options', *options) == 1
    assert "lacks ['annotations', 'categories']" in sentence()


def test_missing_annotation_file_of_a_metric_is_named(run_train, run_test, sentence, checkpoint):
    assert run_train('--cfg-options', 'val_evaluator.ann_file=nope.json') == 1
    assert 'annotation file of the metric ToyMetric nope.json does not exist' in sentence()
    assert run_test('toy.pth', '--cfg-options', 'test_evaluator.ann_file=nope.json') == 1
    assert 'nope.json does not exist' in sentence()


def test_amp_without_gpu_is_refused(run_train, sentence):
    assert run_train('--amp', '--device', 'cpu') == 1
    assert '--amp needs a GPU' in sentence()
    assert run_train('--device', 'cpu', '--cfg-options', 'optim_wrapper.type=AmpOptimWrapper') == 1
    assert 'AmpOptimWrapper in config.py needs a GPU' in sentence()


def test_amp_switches_the_optimizer_wrapper(toy_folder):
    cfg = launch.configs.load_config('config.py')
    launch.configs.enable_amp(cfg)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')


def test_absent_gpu_is_refused(run_train, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert run_train('--device', 'cuda') == 1
    assert 'finds no usable GPU here' in sentence()


def test_unknown_device_is_refused(run_train, sentence):
    assert run_train('--device', 'gpu') == 1
    assert '--device takes auto, cpu, cuda or cuda:N, got gpu' in sentence()


def test_device_index_beyond_the_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(devices.LaunchError, match=r'has 2 GPU\(s\), cuda:0 to cuda:1'):
        devices.resolve_placement('cuda:2', 'none', {})
    with pytest.raises(devices.LaunchError, match='does not go with --launcher pytorch'):
        devices.resolve_placement('cuda:1', 'pytorch', {})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    environ = {'RANK': '0', 'WORLD_SIZE': '4', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '4'}
    with pytest.raises(devices.LaunchError, match=r'4 processes on a machine with 2 GPU\(s\)'):
        devices.resolve_placement('auto', 'pytorch', environ)
    environ['LOCAL_WORLD_SIZE'] = '2'
    placement = devices.resolve_placement('auto', 'pytorch', environ)
    assert (placement.device, placement.backend, placement.world_size) == ('cuda', 'nccl', 4)


@pytest.mark.parametrize(
    ('launcher', 'variable', 'remedy'),
    [
        ('pytorch', 'RANK', 'tools/dist_train.sh'),
        ('slurm', 'SLURM_PROCID', 'tools/slurm_train.sh'),
        ('mpi', 'OMPI_COMM_WORLD_RANK', 'mpirun'),
    ],
)
def test_launcher_that_did_not_start_us_is_named(run_train, sentence, launcher, variable, remedy):
    assert run_train('--launcher', launcher) == 1
    text = sentence()
    assert f'{variable} is not set' in text
    assert remedy in text


def test_slurm_variables_give_the_placement():
    environ = {
        'SLURM_PROCID': '5',
        'SLURM_NTASKS': '8',
        'SLURM_LOCALID': '1',
        'SLURM_NTASKS_PER_NODE': '4(x2)',
    }
    placement = devices.resolve_placement('cpu', 'slurm', environ)
    assert (placement.rank, placement.local_rank, placement.world_size) == (5, 1, 8)
    assert placement.backend == 'gloo'


def test_slurm_task_without_gpu_is_refused_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    environ = {'SLURM_PROCID': '0', 'SLURM_NTASKS': '1', 'SLURM_LOCALID': '0'}
    with pytest.raises(devices.LaunchError, match=r'--gpus-per-node=8 .* or use --device cpu'):
        devices.resolve_placement('auto', 'slurm', environ)
    assert devices.resolve_placement('cpu', 'slurm', environ).device == 'cpu'


def test_lr_scaling_without_base_is_refused(run_train, sentence):
    assert run_train('--auto-scale-lr') == 1
    assert 'auto_scale_lr = dict(base_batch_size=N)' in sentence()


def test_lr_is_scaled_by_the_batch_size(run_train):
    option = 'auto_scale_lr.base_batch_size=16'
    assert run_train('--auto-scale-lr', '--cfg-options', option, 'train_cfg.max_epochs=1') == 0
    import toy

    # 4 pictures a batch for an lr of 0.01 meant for 16; warm-up starts at a tenth.
    assert toy.SEQUENCES['run'][0][3] == pytest.approx(0.01 * 4 / 16 * 0.1)


def test_resume_with_nothing_there_starts_anew(run_train, capsys):
    assert run_train('--resume', '--cfg-options', 'train_cfg.max_epochs=1') == 0
    assert 'Nothing to resume in work_dirs/config: starting a new run.' in capsys.readouterr().out
    assert Path('work_dirs/config/epoch_1.pth').is_file()


def test_resume_finds_a_moved_folder(run_train):
    assert run_train('--work-dir', 'old', '--cfg-options', 'train_cfg.max_epochs=1') == 0
    Path('old').rename('new')
    options = ['--work-dir', 'new', '--resume', '--cfg-options', 'train_cfg.max_epochs=2']
    assert run_train(*options) == 0
    assert Path('new/epoch_2.pth').is_file()


def test_resume_from_missing_file_is_refused(run_train, sentence):
    assert run_train('--resume', 'none.pth') == 1
    assert 'Checkpoint none.pth does not exist: check the path.' in sentence()


def test_resume_from_weights_only_is_refused(run_train, sentence, checkpoint):
    assert run_train('--resume', 'toy.pth') == 1
    text = sentence()
    assert 'toy.pth cannot be resumed, as it lacks message_hub, optimizer' in text
    assert 'load_from=toy.pth' in text


def test_load_from_missing_file_is_refused(run_train, sentence):
    assert run_train('--cfg-options', 'load_from=none.pth') == 1
    assert 'Checkpoint none.pth does not exist: check the path.' in sentence()


def test_missing_checkpoint_names_its_neighbours(run_test, sentence, checkpoint):
    assert run_test('epoch_1.pth') == 1
    assert 'Checkpoint epoch_1.pth does not exist: did you mean toy.pth?' in sentence()


def test_folder_as_checkpoint_names_the_files_in_it(run_test, sentence, checkpoint):
    Path('run').mkdir()
    assert run_test('run') == 1
    assert 'Checkpoint run is a folder: name a file in it.' in sentence()
    Path('toy.pth').rename('run/epoch_3.pth')
    assert run_test('run') == 1
    assert 'is a folder: name a file in it, such as run/epoch_3.pth.' in sentence()


@pytest.mark.parametrize('kind', ['test', 'load_from', 'resume', 'resume weights'])
def test_bad_checkpoint_is_refused_before_the_run_writes(run_train, run_test, kind, checkpoint):
    Path('text.pth').write_text('<html>404</html>')
    runs = {
        'test': lambda: run_test('text.pth'),
        'load_from': lambda: run_train('--cfg-options', 'load_from=text.pth'),
        'resume': lambda: run_train('--resume', 'text.pth'),
        'resume weights': lambda: run_train('--resume', 'toy.pth'),
    }
    assert runs[kind]() == 1
    assert not Path('work_dirs').exists()


def test_initial_weights_can_be_tested(run_test):
    assert run_test('none', '--out', 'metrics.json') == 0
    assert Path('metrics.json').is_file()


def test_file_that_is_no_checkpoint_is_refused(run_test, sentence):
    Path('text.pth').write_text('<html>404</html>')
    assert run_test('text.pth') == 1
    assert 'text.pth is no checkpoint file' in sentence()


def test_checkpoint_with_code_is_refused_and_not_run(run_test, sentence):
    torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': Payload()}, 'code.pth')
    assert run_test('code.pth') == 1
    assert 'contains pickled code' in sentence()
    Path('plain.pth').write_bytes(pickle.dumps(Payload()))
    assert run_test('plain.pth') == 1
    assert 'plain.pth' in sentence()
    assert not Path('canary').exists()


def test_checkpoint_of_another_width_is_refused(run_test, sentence, checkpoint):
    assert run_test('toy.pth', '--cfg-options', 'model.width=5') == 1
    assert 'backbone.weight is (8, 4) there, (8, 5) here' in sentence()


def test_checkpoint_without_a_weight_is_refused(run_test, sentence, checkpoint):
    checkpoint.pop('head.weight')
    torch.save({'state_dict': checkpoint}, 'toy.pth')
    assert run_test('toy.pth') == 1
    text = sentence()
    assert '1 of 8 weights are missing, such as head.weight' in text
    assert 'use the config it was trained with' in text


def test_checkpoint_with_more_layers_is_refused(run_test, sentence, checkpoint):
    checkpoint['backbone.layers.6.weight'] = torch.ones(1)
    torch.save({'state_dict': checkpoint}, 'toy.pth')
    assert run_test('toy.pth') == 1
    text = sentence()
    assert 'toy.pth: The checkpoint does not fit this ToyModel' in text
    assert '1 are unknown here (backbone.layers.6.weight)' in text


def test_training_from_weights_of_another_model_is_refused(run_train, sentence):
    torch.save({'state_dict': {'conv1.weight': torch.zeros(64, 3, 7, 7)}}, 'other.pth')
    assert run_train('--cfg-options', 'load_from=other.pth') == 1
    text = sentence()
    assert 'other.pth: The checkpoint does not fit this Linear: 2 of 2 tensors are missing' in text
    assert not list(Path('work_dirs').glob('*/epoch_*.pth'))


def test_training_from_a_backbone_leaves_a_new_head_at_random(run_train, checkpoint):
    checkpoint['backbone.weight'] = torch.full((8, 4), 0.5)
    checkpoint['head.weight'] = torch.ones(10, 8)
    checkpoint['head.bias'] = torch.zeros(10)
    torch.save({'state_dict': {f'module.{k}': v for k, v in checkpoint.items()}}, 'toy.pth')
    options = ['load_from=toy.pth', 'train_cfg.max_epochs=1', 'optim_wrapper.optimizer.lr=0.0']
    assert run_train('--cfg-options', *options) == 0
    trained = torch.load('work_dirs/config/epoch_1.pth', weights_only=False)['state_dict']
    torch.testing.assert_close(trained['backbone.weight'], torch.full((8, 4), 0.5))
    assert trained['head.weight'].shape == (1, 8)


def test_weights_beside_the_model_are_told(run_test, checkpoint, capsys):
    checkpoint['auxiliary.weight'] = torch.ones(1)
    torch.save({'state_dict': checkpoint}, 'toy.pth')
    assert run_test('toy.pth') == 0
    log = next(Path('work_dirs/config').glob('*/*.log')).read_text()
    assert 'holds 1 weights that the model does not have, such as auxiliary.weight' in log


def test_out_writes_metrics_or_predictions(run_test, sentence, checkpoint):
    assert run_test('toy.pth', '--out', 'out/metrics.json') == 0
    assert set(json.loads(Path('out/metrics.json').read_text())) == {'mean'}
    assert run_test('toy.pth', '--out', 'out/predictions.pkl') == 0
    assert len(pickle.loads(Path('out/predictions.pkl').read_bytes())) == 24


def test_out_that_cannot_be_written_is_refused_before_the_test(run_test, sentence, checkpoint):
    Path('folder.json').mkdir()
    assert run_test('toy.pth', '--out', 'folder.json') == 1
    assert '--out must name a file, got the folder folder.json' in sentence()
    assert run_test('toy.pth', '--out', 'toy.pth/metrics.json') == 1
    assert '--out toy.pth/metrics.json cannot be written: ' in sentence()
    assert not Path('work_dirs').exists()


def test_out_of_unknown_kind_is_refused(run_test, sentence, checkpoint):
    assert run_test('toy.pth', '--out', 'metrics.txt') == 1
    assert 'expected .pkl for predictions or .json for metrics' in sentence()


def test_show_dir_needs_a_task(run_test, sentence, checkpoint):
    assert run_test('toy.pth', '--show-dir', 'drawn') == 1
    assert '--show-dir knows mmpretrain, mmdet and mmseg, got default_scope mmengine' in sentence()


def test_start_report_names_versions_device_and_operators(run_test, checkpoint, capsys):
    assert run_test('toy.pth') == 0
    text = capsys.readouterr().out
    assert f'torch {importlib.metadata.version("torch")}' in text
    assert 'bi_wkv: ' in text
    assert 'mmcv._ext' in text


def test_sync_bn_runs_as_batch_norm_in_one_process(run_train):
    options = ['model.norm=SyncBN', 'train_cfg.max_epochs=1']
    assert run_train('--device', 'cpu', '--cfg-options', *options) == 0
    log = next(Path('work_dirs/config').glob('*/*.log')).read_text()
    assert '1 SyncBN layers run as BatchNorm: there is one process.' in log


def test_work_dir_that_cannot_be_created_is_refused(run_train, sentence):
    Path('taken').touch()
    assert run_train('--work-dir', 'taken') == 1
    assert 'Work folder taken cannot be created (File exists)' in sentence()


def test_bug_keeps_its_traceback(run_train, toy_folder):
    import toy

    class BrokenModel(toy.ToyModel):
        def forward(self, **_):
            raise ValueError('a bug')

    toy.MODELS.register_module(module=BrokenModel, force=True)
    with pytest.raises(ValueError, match='a bug'):
        run_train('--cfg-options', 'model.type=BrokenModel')


@pytest.mark.parametrize(
    ('scope', 'expected'),
    [
        ('mmpretrain', {'type': 'linvis.ClassDrawingHook'}),
        ('mmdet', {'type': 'DetVisualizationHook', 'draw': True}),
        ('mmseg', {'type': 'SegVisualizationHook', 'draw': True}),
    ],
)
def test_show_dir_sets_the_hook_of_the_task(toy_folder, scope, expected):
    cfg = launch.configs.load_config('config.py')
    cfg.default_scope = scope
    cfg.visualizer = {'type': 'Visualizer'}
    launch._draw_into(cfg, 'drawn')
    hook = cfg.default_hooks.visualization
    folder = str(toy_folder / 'drawn')
    assert {key: hook[key] for key in expected} == expected
    assert folder in (hook.get('out_dir'), hook.get('test_out_dir'), cfg.visualizer.get('save_dir'))


@pytest.mark.parametrize(
    ('scope', 'kind'),
    [
        ('mmpretrain', 'DumpResults'),
        ('mmdet', 'DumpDetResults'),
        ('mmseg', 'linvis.DumpSegResults'),
    ],
)
def test_out_adds_the_dumper_of_the_task(toy_folder, scope, kind):
    cfg = launch.configs.load_config('config.py')
    cfg.default_scope = scope
    launch._add_dumper(cfg, Path('a.pkl'))
    assert [metric['type'] for metric in cfg.test_evaluator] == ['ToyMetric', kind]


def test_segmentation_dump_keeps_label_maps_only(tmp_path):
    from linvis.engine import DumpSegResults

    dumper = DumpSegResults(str(tmp_path / 'a.pkl'))
    sample = {key: torch.zeros(2, 2) for key in ('seg_logits', 'gt_sem_seg', 'pred_sem_seg')}
    dumper.process({}, [{**sample, 'img_path': 'a.jpg'}])
    assert set(dumper.results[0]) == {'pred_sem_seg', 'img_path'}
