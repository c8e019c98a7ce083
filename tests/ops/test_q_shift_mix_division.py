"""How Q-Shift with mixes divides its work among programs, and what its kernels cannot take."""

import pytest
import torch

from linvis_ops import available_backends
from linvis_ops._triton import interpreting

# pictures, rows, columns, parts of the channels
TIMED = {(128, 14, 14, 6): ((14, 14), 224), (16, 64, 64, 6): ((64, 64), 128)}
ELONGATED = [
    (b, *hw, 6) for b in (1, 16) for n in (1, 8, 16) for hw in ((n, 4096), (65536 // n, n))
]


@pytest.mark.parametrize('class_token', [False, True])
@pytest.mark.parametrize('shape', [*TIMED, *ELONGATED, (1, 1, 1, 1), (2, 50, 84, 24)])
def test_division_of_the_backward_pass(shape, class_token):
    pytest.importorskip('triton')
    from linvis_ops.q_shift_mix import kernels_triton_backward as kernels

    batch, rows, columns, parts = shape
    division = kernels.divide(batch, rows, columns, class_token, parts)
    walks = []
    for way, (lines, steps) in enumerate(((rows, columns), (columns, rows))):
        length, strips = division.lengths[way], division.strips[way]
        programs = division.runs // -(-steps // length)
        assert programs * strips * kernels.LINES >= batch * (lines + class_token)
        walks.append(min(length, steps) * strips)
    assert division.runs <= kernels.MOST_RUNS
    tokens = batch * rows * columns
    # no program walks much longer than an even share, at least as in squares
    share = tokens / (kernels.LINES * division.runs)
    assert max(walks) <= max(4 * share, 64)
    if shape in TIMED and not class_token:
        assert division == (TIMED[shape][0], (1, 1), TIMED[shape][1])


def test_kernels_say_what_they_cannot_take():
    float64 = torch.zeros(1, 1, 8, dtype=torch.float64)
    many = torch.zeros(1).expand(2**16, 2**15, 8)
    for operator in ('q_shift', 'q_shift_mix'):
        assert available_backends(operator, float64)['torch'] is None
        if available_backends(operator)['triton'] is None:
            assert 'not torch.float64' in available_backends(operator, float64)['triton']
        if interpreting():
            assert 'up to 2**30 tokens' in available_backends(operator, many)['triton']
