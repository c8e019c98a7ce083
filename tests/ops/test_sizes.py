"""Whole numbers from which launches are made."""

import pytest

from linvis_ops._sizes import ceil_div, next_power_of_two


@pytest.mark.parametrize(('size', 'expected'), [(0, 0), (1, 1), (7, 1), (8, 2), (14, 2), (15, 3)])
def test_parts_cover_a_size(size, expected):
    assert ceil_div(size, 7) == expected


@pytest.mark.parametrize(
    ('size', 'expected'),
    [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (192, 256), (2**40 + 1, 2**41)],
)
def test_powers_of_two_hold_a_size(size, expected):
    assert next_power_of_two(size) == expected


def test_they_are_those_of_triton():
    triton = pytest.importorskip('triton')
    for size in range(1, 300):
        assert next_power_of_two(size) == triton.next_power_of_2(size)
        assert ceil_div(size, 16) == triton.cdiv(size, 16)
