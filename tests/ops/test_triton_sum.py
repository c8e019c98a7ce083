"""Sums over rows, against PyTorch's in float64."""

import pytest
import torch

from linvis_ops._triton import interpreting

DEVICES = [
    pytest.param(
        'cpu',
        marks=pytest.mark.skipif(not interpreting(), reason='needs TRITON_INTERPRET=1'),
        id='triton-interpreter',
    ),
    pytest.param('cuda', marks=pytest.mark.gpu, id='triton-cuda'),
]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    ('rows', 'columns', 'parts'), [(1, 5, 1), (256, 32, 1), (300, 66, 2), (513, 96, 3)]
)
def test_sum_rows(device, rows, columns, parts):
    from linvis_ops._triton_sum import sum_rows

    x = torch.randn(rows, columns, device=device)
    outs = sum_rows(x, parts)
    assert [out.shape for out in outs] == [(columns // parts,)] * parts
    torch.testing.assert_close(torch.cat(outs).double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(outs, sum_rows(x, parts), strict=True))
