"""Operator tests run with memory from torch.empty filled with NaN."""

import pytest

from linvis_ops.testing import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield
