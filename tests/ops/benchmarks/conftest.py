"""Stand-ins for a GPU and for what is measured on one."""

import contextlib

import pytest
import torch

from benchmarks import passes, registry, results
from benchmarks.timing import Timing


class StandInTimer:
    """Runs on the CPU; every call takes half a MiB and 1 to 3 ms."""

    device = 'cpu'

    def __init__(self):
        self.ran = 0

    def times(self, run, repeats):
        run()
        self.ran += 1
        return Timing([1 + 2 * i / (repeats - 1) for i in range(repeats)], graph=True)

    def allocated(self):
        return 2**20

    def peak(self, run):
        run()
        return 2**20 + 2**19

    def release(self):
        pass


class StandInCudaTimer(StandInTimer, contextlib.AbstractContextManager):
    flush_bytes = 2**28

    def __exit__(self, *error):
        return None


@pytest.fixture
def timer():
    return StandInTimer()


@pytest.fixture
def with_gpu(monkeypatch):
    """run.py believes that there is a GPU, and measures on the CPU."""
    monkeypatch.setattr('benchmarks.run.has_gpu', lambda: True)
    monkeypatch.setattr('torch.cuda.mem_get_info', lambda: (2**24, 2**24))
    monkeypatch.setattr('benchmarks.run.CudaTimer', StandInCudaTimer)
    monkeypatch.setattr('benchmarks.results.make_header', lambda *_, **fields: header(**fields))


def header(**fields):
    known = {
        **dict.fromkeys(results.HEADER_FIELDS),
        'gpu': 'NVIDIA Stand-in 80GB HBM3',
        'commit': '0123456789abcdef',
        'dirty': False,
        'date': '2000-01-01',
        'driver': '1.2',
        'torch': '2.0',
        'triton': '3.0',
        'command': 'python ops/benchmarks/run.py',
        'copies': {'copy 4.0': 1000.0},
        'copy_gb_s': 1000.0,
        'copy_gib': 4.0,
        'copy_way': 'copy',
        'floor_ms': 0.003,
        'flush_mib': 256.0,
        'complete': True,
    }
    return {**known, **fields}


def row(impl, sizes, milliseconds, *, name='bi_wkv', dtype='bfloat16', pass_name='fwd', **fields):
    """A row of made-up times."""
    (operator,) = registry.named([name])
    shape = operator.shape(sizes)
    least = operator.bytes_by_pass(shape, getattr(torch, dtype))[pass_name]
    known = {
        'op': name,
        'impl': impl,
        'pass': pass_name,
        'dtype': dtype,
        'shape': shape,
        'ours': impl in ('triton', 'torch'),
        'tokens': passes.tokens(shape),
        'elements': registry.elements(shape),
        'least_bytes': least,
        'ms': milliseconds,
        'ms_10': milliseconds,
        'ms_90': milliseconds,
        'repeats': 5,
        'gb_s': least / milliseconds / 1e6,
        'copy_share': least / milliseconds / 1e9,
        'peak_mib': 12.0,
        'graph': True,
        'call': 'forward',
        'note': None,
    }
    return {**known, **fields}


@pytest.fixture
def make_row():
    return row


@pytest.fixture
def make_results():
    def make(rows, left_out=(), **fields):
        return {'header': header(**fields), 'rows': list(rows), 'left_out': list(left_out)}

    return make
