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


def test_sentence_has_one_line():
    assert user_sentence(LaunchError('first\n  second')) == 'first second'


def test_full_gpu_memory_comes_with_a_remedy():
    error = torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')
    sentence = user_sentence(error)
    assert 'lower train_dataloader.batch_size' in sentence
    assert 'Tried to allocate 2.00 GiB' in sentence


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
