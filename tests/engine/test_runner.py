"""What linvis' runner does otherwise than mmengine's: compiling."""

import pytest
import torch


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled and with which options, instead of compiling it."""
    calls = []
    monkeypatch.setattr(
        torch.nn.Module, 'compile', lambda self, **options: calls.append((type(self), options))
    )
    return calls


@pytest.mark.parametrize(
    ('setting', 'options'),
    [
        ('compile=True', {'fullgraph': True}),
        ('compile.dynamic=True', {'fullgraph': True, 'dynamic': True}),
        ('compile.fullgraph=False', {'fullgraph': False}),
    ],
)
def test_compile_is_for_the_backbone(run_train, compiled, setting, options):
    # parameter groups as in the configs; mmengine compiles the training step, which fails with them
    groups = 'optim_wrapper.paramwise_cfg.norm_decay_mult=0.0'
    decay = 'optim_wrapper.optimizer.weight_decay=0.05'
    assert run_train('--cfg-options', setting, groups, decay) == 0
    assert compiled == [(torch.nn.Linear, options)]


def test_compile_without_options_in_a_config(run_train, toy_folder, compiled):
    with (toy_folder / 'config.py').open('a') as config:
        config.write('compile = dict()\n')
    assert run_train() == 0
    assert compiled == [(torch.nn.Linear, {'fullgraph': True})]


def test_nothing_is_compiled_unless_asked_for(run_train, compiled):
    assert run_train('--cfg-options', 'compile=False') == 0
    assert compiled == []


def test_wrong_compile_setting_is_told(run_train, capsys):
    assert run_train('--cfg-options', 'compile=fast') == 1
    assert (
        'compile must be True, False or a dict of options of torch.compile'
        in capsys.readouterr().err
    )
