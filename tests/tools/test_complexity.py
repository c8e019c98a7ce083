import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS

from linvis import cli
from linvis.models import VRWKV, ViG, ViGHierarchical, ViR
from tools.analysis.complexity import main, measure


def test_macs_are_those_of_projections_patches_operator_and_norms():
    channels, tokens, depth = 16, 6, 2
    complexity = measure(VRWKV({'embed_dims': channels, 'depth': depth}), 32, 48)
    # Four projections of the spatial mix; of the channel mix, one and two of four times the width.
    assert complexity.macs['aten.mm'] == depth * tokens * channels**2 * (4 + 1 + 8)
    assert complexity.macs['aten.convolution'] == tokens * channels * 3 * 16**2
    assert complexity.macs['linvis.bi_wkv_fwd'] == depth * tokens * channels * 13 / 2
    # Two norms a layer, the norm of the input and the last one.
    norms = 2 * depth + 2
    assert complexity.macs['aten.native_layer_norm'] == norms * tokens * channels * 5
    assert len(complexity.macs) == 4


def test_macs_of_vig_are_those_of_projections_convolutions_and_operator():
    channels, heads, tokens, depth = 16, 2, 6, 2
    arch = {'embed_dims': channels, 'depth': depth, 'num_heads': heads}
    complexity = measure(ViG(arch), 32, 48)
    hidden = 256
    products = channels**2 * (2 + 1) + 16 * channels + 3 * channels * hidden
    assert complexity.macs['aten.mm'] == depth * tokens * products
    # with a bias: the second projection of the gates, the share of the global branch
    assert complexity.macs['aten.addmm'] == depth * tokens * (16 * channels + channels**2)
    stem = (4 * tokens * 9**2 * 3 + tokens * 3**2 * channels) * channels // 2
    assert complexity.macs['aten.convolution'] == stem + depth * tokens * channels * 3**2
    state = (channels // 2 // heads) * (channels // heads)
    assert complexity.macs['linvis.bi_gla_fwd'] == depth * tokens * heads * state * 2 * 3
    assert len(complexity.macs) == 4


@pytest.mark.parametrize(
    ('retention', 'direction', 'macs_of_state'),
    [
        ('1d', 'causal', 3),
        ('1d', 'bidirectional', 2 * 3),
        ('2d', 'causal', 4),
        ('2d', 'bidirectional', 2 * 4),
    ],
)
def test_macs_of_vir_are_those_of_projections_patches_operator_and_norms(
    retention, direction, macs_of_state
):
    channels, heads, patches, depth = 16, 2, 6, 2
    arch = {'embed_dims': channels, 'depth': depth, 'num_heads': heads}
    complexity = measure(ViR(arch, retention=retention, direction=direction), 32, 48)
    tokens = patches + 1  # the class token
    # queries, keys, values, output; two layers of the mlp with four times the width
    assert complexity.macs['aten.addmm'] == depth * tokens * channels**2 * (3 + 1 + 8)
    assert complexity.macs['aten.convolution'] == patches * channels * 3 * 16**2
    state = heads * (channels // heads) ** 2
    assert complexity.macs['linvis.retention_fwd'] == depth * tokens * state * macs_of_state
    assert complexity.macs['aten.native_layer_norm'] == (2 * depth + 1) * tokens * channels * 5
    assert len(complexity.macs) == 4


def test_operator_counts_the_same_for_any_backend_and_is_linear_in_the_tokens():
    arch = {'embed_dims': 16, 'depth': 1, 'num_heads': 2}
    macs = [
        measure(ViR(arch, backend=backend), 16 * rows, 64).macs['linvis.retention_fwd']
        for backend, rows in (('auto', 4), ('torch', 4), ('auto', 8))
    ]
    assert macs[0] == macs[1] == 17 * macs[2] / 33


def test_norms_of_vig_are_not_counted():
    arch = {'embed_dims': 16, 'depths': (1, 1), 'num_heads': (1, 2)}
    assert 'aten.native_layer_norm' not in measure(ViGHierarchical(arch), 32, 48).macs


def test_parameters_are_listed_by_part():
    with torch.device('meta'):
        complexity = measure(VRWKV('tiny'), 224, 224)
    assert list(complexity.parameters) == ['pos_embed', 'patch_embed', 'layers', 'ln1']
    assert sum(complexity.parameters.values()) == 6_155_176 - 193_000


def test_arch_of_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['complexity.py', '--arch', 'large', '--shape', '384', '384'])
    assert main() == 0
    totals = [line.split()[1] for line in capsys.readouterr().out.splitlines() if 'total' in line]
    assert totals[1] == '189.4880'  # the paper: 189.5


@pytest.mark.parametrize(
    ('backbone', 'totals'),
    [
        ('ViG', ['5.6415', '1.1965']),
        ('ViGHierarchical', ['27.8317', '4.5371']),
        ('HybridViR', ['32.2791', '4.6275']),
    ],
)
def test_backbone_of_the_command_line(monkeypatch, capsys, backbone, totals):
    monkeypatch.setattr('sys.argv', ['complexity.py', '--backbone', backbone, '--arch', 'tiny'])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if 'total' in line] == totals


def test_unknown_arch_is_named(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['complexity.py', '--backbone', 'ViG', '--arch', 'large'])
    assert main() == 1
    assert "one of tiny, small, base or a dict, got 'large'" in capsys.readouterr().err


@pytest.mark.parametrize('family', ['vig', 'vir'])
def test_metafile_has_the_figures_of_the_backbones(family, project):
    models = yaml.safe_load((project / 'configs' / family / 'metafile.yml').read_text())['Models']
    classifiers = [model for model in models if 'FLOPs' in model['Metadata']]
    assert len(classifiers) >= 6
    for model in classifiers:
        with torch.device('meta'):
            backbone = MODELS.build(Config.fromfile(project / model['Config']).model.backbone)
        macs = sum(measure(backbone, 224, 224).macs.values())
        assert round(macs / 1e6) * 10**6 == model['Metadata']['FLOPs'], model['Name']


CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='linvis.VRWKV', arch='tiny', out_type='avg_featmap'),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=192),
)
"""


def test_model_of_a_config(tmp_path, monkeypatch, capsys):
    config = tmp_path / 'classifier.py'
    config.write_text(CONFIG)
    monkeypatch.setattr('sys.argv', ['complexity.py', str(config)])
    assert main() == 0
    output = capsys.readouterr().out
    totals = [line.split()[1] for line in output.splitlines() if 'total' in line]
    assert totals == ['6.1552', '1.1639']
    assert 'head' in output


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        ('vrwkv-tny.py', 'vrwkv-tny.py does not exist. Did you mean configs/vrwkv-tiny.py?'),
        ('configs', 'configs is a folder, not a file.'),
        ('readme.md', 'readme.md has the ending .md: expected .py, .yaml or .json.'),
        ('syntax.py', 'syntax.py cannot be read: SyntaxError: '),
        ('part.py', 'part.py has no `model`: is it a part meant for _base_?'),
        ('type.py', 'ImageClasifier is not a known model: check `type` in the config.'),
    ],
)
def test_config_that_cannot_be_used_is_explained_as_by_train(
    tmp_path, monkeypatch, capsys, config, expected
):
    monkeypatch.chdir(tmp_path)
    files = {
        'configs/vrwkv-tiny.py': CONFIG,
        'readme.md': '',
        'syntax.py': 'model = dict(',
        'part.py': 'x = 1',
        'type.py': CONFIG.replace('ImageClassifier', 'ImageClasifier'),
    }
    (tmp_path / 'configs').mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr('sys.argv', ['complexity.py', config])
    assert main() == 1
    err = capsys.readouterr().err
    assert err.startswith('complexity.py: ')
    assert expected in err
    assert err.count('\n') == 1
    if config == 'type.py':
        return
    assert cli.main_train([config]) == 1
    assert capsys.readouterr().err.partition(': ')[2] == err.partition(': ')[2]


def test_bug_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ValueError('a bug')

    monkeypatch.setattr('tools.analysis.complexity.measure', broken)
    monkeypatch.setattr('sys.argv', ['complexity.py', '--arch', 'tiny'])
    with pytest.raises(ValueError, match='a bug'):
        main()
