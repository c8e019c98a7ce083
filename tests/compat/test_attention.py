import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

from linvis_ops.ms_deform_attn import ms_deform_attn

SHAPES = torch.tensor([[3, 4], [2, 2]])
STARTS = torch.tensor([0, 12])


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(2, 16, 2, 3, generator=generator)
    locations = torch.rand(2, 5, 2, 2, 2, 2, generator=generator)
    weights = torch.rand(2, 5, 2, 2, 2, generator=generator)
    return [tensor.to(dtype).requires_grad_() for tensor in (value, locations, weights)]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_ms_deform_attn_of_mmcv_is_our_operator(dtype):
    ours, theirs = inputs(dtype), inputs(dtype)
    expected = ms_deform_attn(ours[0], SHAPES, STARTS, *ours[1:])
    actual = MultiScaleDeformableAttnFunction.apply(theirs[0], SHAPES, STARTS, *theirs[1:], 64)
    assert torch.equal(actual, expected)
    upstream = torch.rand_like(expected)
    expected.backward(upstream)
    actual.backward(upstream)
    for a, b in zip(theirs, ours, strict=True):
        assert a.grad.any()
        torch.testing.assert_close(a.grad, b.grad)
