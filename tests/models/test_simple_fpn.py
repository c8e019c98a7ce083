import pytest
import torch

from linvis.models import SimpleFeaturePyramid


@pytest.mark.parametrize('norm_cfg', [None, {'type': 'BN'}], ids=['plain', 'BN'])
def test_four_levels_around_the_stride_of_the_map(norm_cfg):
    neck = SimpleFeaturePyramid(16, 24, norm_cfg=norm_cfg)
    outputs = neck((torch.randn(2, 16, 6, 10),))
    sizes = [tuple(output.shape) for output in outputs]
    assert sizes == [(2, 24, 24, 40), (2, 24, 12, 20), (2, 24, 6, 10), (2, 24, 3, 5)]


def test_further_levels_take_every_second_cell():
    outputs = SimpleFeaturePyramid(16, 24, num_outs=5)(torch.randn(1, 16, 8, 12))
    assert len(outputs) == 5
    torch.testing.assert_close(outputs[4], outputs[3][:, :, ::2, ::2], rtol=0, atol=0)


@pytest.mark.parametrize('hw', [(1, 1), (5, 7)], ids=str)
def test_odd_maps_round_up(hw):
    outputs = SimpleFeaturePyramid(8, 8)(torch.randn(1, 8, *hw))
    assert outputs[3].shape[2:] == (-(-hw[0] // 2), -(-hw[1] // 2))


def test_a_norm_follows_each_convolution():
    neck = SimpleFeaturePyramid(16, 24, norm_cfg={'type': 'GN', 'num_groups': 4})
    counts = [
        sum(isinstance(m, torch.nn.GroupNorm) for m in level.modules()) for level in neck.levels
    ]
    assert counts == [3, 2, 2, 2]


def test_gradient_reaches_every_parameter():
    neck = SimpleFeaturePyramid(8, 8, num_outs=5, norm_cfg={'type': 'BN'})
    outputs = neck(torch.randn(2, 8, 4, 4))
    sum((y * torch.randn_like(y)).sum() for y in outputs).backward()
    assert all(parameter.grad.any() for parameter in neck.parameters())


@pytest.mark.parametrize(
    ('shapes', 'got'),
    [
        ([(1, 8, 4, 4), (1, 8, 2, 2)], r'\[\(1, 8, 4, 4\), \(1, 8, 2, 2\)\]'),
        ([(1, 4, 4, 4)], r'\[\(1, 4, 4, 4\)\]'),
        ([], r'\[\]'),
    ],
    ids=['two maps', 'channels', 'none'],
)
def test_other_inputs_are_refused_in_one_sentence(shapes, got):
    with pytest.raises(ValueError, match=rf'takes one map \(B, 8, H, W\), got {got}; set out_ind'):
        SimpleFeaturePyramid(8, 8)([torch.zeros(shape) for shape in shapes])


def test_fewer_than_four_levels_are_refused():
    with pytest.raises(ValueError, match='num_outs must be at least 4, got 3'):
        SimpleFeaturePyramid(8, 8, num_outs=3)
