"""The tests' own tools: poisoned memory and the comparison with float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linvis_ops
from linvis_ops.testing import FLOORS, WORST_ELEMENT, assert_matches, poisoned_memory

FRESH = {
    'empty': lambda like: torch.empty(2, 3, dtype=like.dtype),
    'empty_like': lambda like: torch.empty_like(like),  # looked up when called
    'empty_permuted': lambda like: torch.empty_permuted((2, 3), (1, 0), dtype=like.dtype),
    'empty_strided': lambda like: torch.empty_strided((2, 3), (1, 2), dtype=like.dtype),
    'new_empty': lambda like: like.new_empty(2, 3),
    'new_empty_strided': lambda like: like.new_empty_strided((2, 3), (1, 2)),
}


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('make', FRESH.values(), ids=FRESH)
def test_memory_of_floats_is_poisoned(make, dtype):
    like = torch.zeros(2, 3, dtype=dtype)
    with poisoned_memory():
        fresh = make(like)
    assert fresh.shape == (2, 3)
    assert fresh.isnan().all()


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_memory_that_is_not_asked_for_in_python_is_poisoned(device):
    # as C++ code asks for it
    empty = torch.ops.aten.empty.memory_format
    with poisoned_memory():
        assert empty([2, 3], device=device).isnan().all()


@pytest.mark.parametrize('make', FRESH.values(), ids=FRESH)
def test_memory_of_integers_is_left_alone(make):
    with poisoned_memory():
        assert make(torch.zeros(2, 3, dtype=torch.int64)).dtype == torch.int64


def test_poison_ends_with_the_block():
    before = torch.empty, torch.empty_permuted, torch.Tensor.new_empty_strided
    with poisoned_memory():
        assert torch.empty_permuted is not before[1]
    assert before == (torch.empty, torch.empty_permuted, torch.Tensor.new_empty_strided)


def test_forgotten_element_is_found():
    reference = torch.ones(4, 5, dtype=torch.float64)
    y = torch.empty(4, 5)
    y[:, :4] = 1
    with pytest.raises(AssertionError, match='y: not finite where the reference is'):
        assert_matches('y', y, reference, None, torch.float32)


@pytest.mark.parametrize('dtype', FLOORS)
def test_error_below_the_floor_passes_and_above_fails(dtype):
    reference = torch.randn(50, 60, dtype=torch.float64)
    for factor, passes in ((0.9, True), (1.1, False)):
        actual = reference * (1 + factor * FLOORS[dtype])
        if passes:
            assert_matches('y', actual, reference, None, dtype)
        else:
            with pytest.raises(AssertionError, match=r'y .* relative rms error .* exceeds'):
                assert_matches('y', actual, reference, None, dtype)


def test_floor_of_its_own():
    reference = torch.ones(10, dtype=torch.float64)
    actual = (reference + 1e-4).float()
    assert_matches('y', actual, reference, None, torch.float32, floor=2e-4)
    with pytest.raises(AssertionError, match='exceeds 5e-05'):
        assert_matches('y', actual, reference, None, torch.float32, floor=5e-5)


def test_twice_the_error_of_plain_arithmetic_is_allowed():
    reference = torch.randn(50, 60, dtype=torch.float64)
    plain = reference * 1.01
    assert_matches('y', reference * 1.019, reference, plain, torch.float32)
    with pytest.raises(AssertionError, match='relative rms error'):
        assert_matches('y', reference * 1.021, reference, plain, torch.float32)


def test_one_bad_element_does_not_hide_in_the_mean():
    reference = torch.ones(1000, 1000, dtype=torch.float64)
    actual = reference.clone()
    actual[3, 7] += 1.5 * WORST_ELEMENT * FLOORS[torch.float32]
    with pytest.raises(AssertionError, match=r'worst element \(3, 7\): error'):
        assert_matches('dk', actual, reference, None, torch.float32)


def test_infinity_in_place_of_a_number_fails():
    reference = torch.ones(3, dtype=torch.float64)
    actual = torch.tensor([1.0, float('inf'), 1.0])
    with pytest.raises(AssertionError, match='not finite'):
        assert_matches('y', actual, reference, None, torch.float32)


def test_poison_leaves_device_contexts_alone():
    # a process of its own: the first use of a device context decides what it acts on
    code = """
import torch
from linvis_ops.testing import poisoned_memory
with poisoned_memory(), torch.device('meta'):
    torch.zeros(1)
with torch.device('meta'):
    print(torch.empty(1).device)
"""
    folder = str(Path(linvis_ops.__path__[0]).parent)
    done = subprocess.run(
        [sys.executable, '-c', f'import sys; sys.path.insert(0, {folder!r})\n{code}'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == 'meta\n'
