import importlib.util
import py_compile

import pytest
import torch
from torch.utils.data import DataLoader

from linvis.engine.errors import LaunchError, user_sentence
from linvis.models.backbones import VRWKV


def caught(function, *args, **kwargs) -> Exception:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError('nothing was raised')


def raise_from(error: Exception) -> None:
    raise error


def test_deliberate_error_of_linvis_is_a_sentence():
    error = caught(VRWKV, arch='gigantic')
    assert 'gigantic' in user_sentence(error)


def test_error_raised_elsewhere_is_a_bug():
    assert user_sentence(caught(raise_from, ValueError('elsewhere'))) is None


def test_accidental_error_inside_linvis_is_a_bug():
    from linvis.engine.devices import _ranks

    environ = {'RANK': 'three', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0'}
    error = caught(_ranks, 'pytorch', environ)
    assert isinstance(error, ValueError)
    assert user_sentence(error) is None


SOURCE = """
def deliberate(value):
    if value: raise ValueError('on purpose')

def accidental(value):
    if value: return int('three')
    raise ValueError(
        'text ' + value)
"""


@pytest.fixture
def module_without_source(tmp_path):
    """A module of linvis, compiled, as in a frozen program."""
    path = tmp_path / 'somewhere.py'
    path.write_text(SOURCE)
    py_compile.compile(str(path), cfile=str(tmp_path / 'somewhere.pyc'))
    path.unlink()
    spec = importlib.util.spec_from_file_location('linvis.somewhere', tmp_path / 'somewhere.pyc')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ('function', 'value', 'expected'),
    [
        ('deliberate', True, 'on purpose'),
        ('accidental', True, None),
        # a bug within the statement that was to raise
        ('accidental', None, None),
    ],
)
def test_deliberate_is_what_a_raise_instruction_throws(
    module_without_source, function, value, expected
):
    error = caught(getattr(module_without_source, function), value)
    assert user_sentence(error) == expected


def test_sentence_has_one_line():
    assert user_sentence(LaunchError('first\n  second')) == 'first second'


def test_class_beyond_those_of_the_head_comes_with_a_remedy():
    # as the losses of mmpretrain word it, and torch.nn.functional.one_hot
    for error in (
        AssertionError('Class Index must be less than number of classes'),
        RuntimeError('Class values must be smaller than num_classes.'),
    ):
        assert 'set that to the number of classes' in user_sentence(error)
    assert user_sentence(AssertionError('something else')) is None


each_task = pytest.mark.parametrize(
    ('task', 'remedy'),
    [
        ('train', 'lower train_dataloader.batch_size (in validation that of val_dataloader), or'),
        ('test', 'lower test_dataloader.batch_size, or'),
        ('stream', 'take lower bands with --band, or'),
    ],
)


@each_task
def test_full_gpu_memory_comes_with_a_remedy(task, remedy):
    error = torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')
    sentence = user_sentence(error, task)
    assert remedy in sentence
    assert ('batch_size' in sentence) == (task != 'stream')
    assert ('with_cp' in sentence) == (task == 'train')
    assert 'Tried to allocate 2.00 GiB' in sentence


@each_task
def test_full_memory_of_the_machine_comes_with_a_remedy(task, remedy):
    sentence = user_sentence(caught(torch.empty, 2**55), task)
    assert f'{remedy} take a smaller model' in sentence
    assert sentence.endswith(f'(you tried to allocate {4 * 2**55} bytes).')


class Unreadable(torch.utils.data.Dataset):
    def __init__(self, ours: bool) -> None:
        self.ours = ours

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if self.ours:
            from linvis.datasets import UnreadableDataError

            raise UnreadableDataError('3 files are unreadable, the limit is 2.')
        raise ValueError('a bug of a transform')


def read_all(dataset: Unreadable) -> None:
    for _ in DataLoader(dataset, num_workers=1):
        pass


@pytest.mark.parametrize(
    ('ours', 'expected'),
    [(True, '3 files are unreadable, the limit is 2.'), (False, None)],
    ids=['guard', 'bug'],
)
def test_error_in_a_loader_process(ours, expected):
    assert user_sentence(caught(read_all, Unreadable(ours))) == expected


def test_model_that_mmengine_calls_with_too_little_keeps_its_traceback(run_train, toy_folder):
    import toy

    class DemandingModel(toy.ToyModel):
        def forward(self, more, **_):
            return more

    toy.MODELS.register_module(module=DemandingModel, force=True)
    with pytest.raises(TypeError, match='missing 1 required positional argument'):
        run_train('--cfg-options', 'model.type=DemandingModel')


def build(kind: str, **arguments):
    from mmengine.registry import MODELS, init_default_scope

    from linvis import compat

    compat.install()
    init_default_scope('mmseg')
    MODELS.build({'type': kind, **arguments})


def test_value_that_a_model_of_a_library_is_not_built_with_is_told():
    head = {'in_channels': 8, 'channels': 8, 'num_convs': 0}
    error = caught(build, 'FCNHead', **head, num_classes='abc')
    assert isinstance(error, TypeError)
    sentence = user_sentence(error)
    assert sentence.startswith('FCNHead cannot be built (TypeError: ')
    assert sentence.endswith(': check the config.')
    error = caught(build, 'FCNHead', **head | {'channels': 9}, num_classes=2)
    assert user_sentence(error).startswith('FCNHead cannot be built (AssertionError')


def test_bug_in_a_constructor_of_ours_or_of_the_user_keeps_its_traceback(monkeypatch):
    def with_bug(_self, *_args, **_kwargs):
        raise_from(TypeError('a bug'))

    monkeypatch.setattr(VRWKV, '__init__', with_bug)
    assert user_sentence(caught(build, 'linvis.VRWKV', arch='tiny')) is None
    wrapped = {'backbone': {'type': 'linvis.VRWKV'}, 'decode_head': {}}
    assert user_sentence(caught(build, 'EncoderDecoder', **wrapped)) is None
