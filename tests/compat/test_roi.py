import math

import pytest
import torch
from mmcv.ops import RoIAlign, roi_align

ROIS = [
    [0, 1.0, 2.0, 7.5, 9.0],
    [1, -3.0, -2.0, 4.0, 5.0],  # over the edge
    [1, 6.0, 6.0, 20.0, 30.0],
    [0, 5.0, 5.0, 5.2, 5.1],  # less than a pixel
]


def features(dtype=torch.float64):
    return torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0)).to(dtype)


def sample(map_, y, x):
    height, width = map_.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(map_.shape[0], dtype=map_.dtype)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    i, j = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    v, u = y - i, x - j
    top = (1 - u) * map_[:, i, j] + u * map_[:, i, j + 1]
    bottom = (1 - u) * map_[:, i + 1, j] + u * map_[:, i + 1, j + 1]
    return (1 - v) * top + v * bottom


def roi_align_by_loops(input, rois, bins, scale, ratio, aligned):
    rows, columns = bins
    out = torch.zeros(len(rois), input.shape[1], rows, columns, dtype=input.dtype)
    shift = 0.5 if aligned else 0
    for r, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (scale * corner - shift for corner in corners)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1), max(width, 1)
        ny = ratio or math.ceil(height / rows)
        nx = ratio or math.ceil(width / columns)
        for i in range(rows):
            for j in range(columns):
                for p in range(ny):
                    for q in range(nx):
                        y = y1 + (i + (p + 0.5) / ny) * height / rows
                        x = x1 + (j + (q + 0.5) / nx) * width / columns
                        out[r, :, i, j] += sample(input[int(image)], y, x) / (ny * nx)
    return out


@pytest.mark.parametrize('aligned', [True, False], ids=['aligned', 'legacy'])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('scale', [1.0, 0.5])
def test_roi_align_equals_explicit_loops(aligned, ratio, scale):
    rois = torch.tensor(ROIS, dtype=torch.float64)
    expected = roi_align_by_loops(features(), rois, (3, 2), scale, ratio, aligned)
    actual = roi_align(features(), rois, (3, 2), scale, ratio, 'avg', aligned)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('aligned', [True, False], ids=['aligned', 'legacy'])
def test_roi_align_gradients_pass_gradcheck(aligned):
    rois = torch.tensor(ROIS, dtype=torch.float64)

    def call(x):
        return roi_align(x, rois, (2, 3), 0.5, 0, 'avg', aligned)

    assert torch.autograd.gradcheck(call, [features().requires_grad_()])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_rounds_half_precision_once(dtype):
    rois = torch.tensor(ROIS, dtype=dtype)
    x, exact_x = features(dtype).requires_grad_(), features(dtype).float().requires_grad_()
    actual = roi_align(x, rois, 3, 0.5, 2)
    exact = roi_align(exact_x, rois.float(), 3, 0.5, 2)
    assert actual.dtype == dtype
    assert torch.equal(actual, exact.to(dtype))
    actual.sum().backward()
    exact.sum().backward()
    assert torch.equal(x.grad, exact_x.grad.to(dtype))


def test_roi_align_takes_float32_regions_beside_half_precision_features():
    rois = torch.tensor([[0, 1.03, 2.07, 7.51, 6.49]])
    actual = roi_align(features(torch.bfloat16), rois, 3)
    assert torch.equal(actual, roi_align(features(torch.bfloat16).float(), rois, 3).bfloat16())


def test_roi_align_takes_strided_features_and_gradients():
    rois = torch.tensor(ROIS, dtype=torch.float64)
    x = features().to(memory_format=torch.channels_last).requires_grad_()
    plain = features().requires_grad_()
    strided, expected = (roi_align(t, rois, 3) for t in (x, plain))
    assert torch.equal(strided, expected)
    weight = torch.rand(3, 3, 3, 4, dtype=torch.float64).permute(3, 2, 1, 0)
    (strided * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_roi_align_of_no_regions_is_empty():
    x = features().requires_grad_()
    out = RoIAlign(7)(x, torch.zeros(0, 5, dtype=torch.float64))
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert not x.grad.any()


def test_roi_align_of_maxima_says_what_to_do_in_one_sentence():
    with pytest.raises(
        NotImplementedError, match=r"^RoIAlign with pool_mode='max' .*\(mmcv\._ext\)\.$"
    ):
        roi_align(features(), torch.tensor(ROIS).double(), 3, 1.0, 0, 'max')
