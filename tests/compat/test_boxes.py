import math

import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms, nms, nms_match, soft_nms

from linvis.compat import boxes as stand_in


def random_boxes(count=40, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = 60 * torch.rand(count, 2, generator=generator)
    size = 5 + 40 * torch.rand(count, 2, generator=generator)
    scores = torch.rand(count, generator=generator)
    return torch.cat([corner, corner + size], 1).to(dtype), scores.to(dtype)


def iou(a, b, offset=0):
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    width = max(0, min(ax2, bx2) - max(ax1, bx1) + offset)
    height = max(0, min(ay2, by2) - max(ay1, by1) + offset)
    area_a = (ax2 - ax1 + offset) * (ay2 - ay1 + offset)
    area_b = (bx2 - bx1 + offset) * (by2 - by1 + offset)
    return width * height / (area_a + area_b - width * height)


def nms_by_loops(boxes, scores, threshold, offset):
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[k], offset) <= threshold for k in kept):
            kept.append(i)
    return kept


def soft_nms_by_loops(boxes, scores, threshold, sigma, min_score, method, offset):
    scores, left, taken = list(scores), list(range(len(scores))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        taken.append((best, scores[best]))
        left.remove(best)
        for i in left:
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap if method == 'linear' else 0
        left = [i for i in left if scores[i] >= min_score]
    return taken


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.6])
def test_nms_equals_explicit_loops(offset, threshold):
    boxes, scores = random_boxes()
    expected = nms_by_loops(boxes.tolist(), scores.tolist(), threshold, offset)
    dets, kept = nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == expected
    assert 0 < len(expected) < len(boxes)
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], 1)[expected])


def test_nms_offset_counts_the_last_pixel():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4]])  # 100 and 50 pixels: IoU 0.5, else 4/9
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.48, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.48, offset=1)[1].tolist() == [0]


def test_nms_honours_score_threshold_and_max_num():
    boxes, scores = random_boxes()
    kept = nms(boxes, scores, 0.5, score_threshold=0.4, max_num=3)[1]
    chosen = (scores > 0.4).nonzero().flatten()
    expected = nms_by_loops(boxes[chosen].tolist(), scores[chosen].tolist(), 0.5, 0)[:3]
    assert kept.tolist() == chosen[expected].tolist()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_of_other_dtypes_equals_that_of_the_same_numbers_in_float32(dtype):
    boxes, scores = random_boxes(dtype=dtype)
    scores = torch.randperm(len(scores)).to(dtype) / 64  # no ties after rounding
    kept = nms(boxes, scores, 0.5)[1]
    assert torch.equal(kept, nms(boxes.float(), scores.float(), 0.5)[1])


def test_batched_nms_keeps_classes_apart():
    boxes, scores = random_boxes()
    classes = torch.arange(len(scores)) % 3
    kept = batched_nms(boxes, scores, classes, {'type': 'nms', 'iou_threshold': 0.3})[1]
    expected = set()
    for c in range(3):
        members = (classes == c).nonzero().flatten()
        chosen = nms_by_loops(boxes[members].tolist(), scores[members].tolist(), 0.3, 0)
        expected |= set(members[chosen].tolist())
    assert set(kept.tolist()) == expected
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_equals_explicit_loops(method, offset):
    boxes, scores = random_boxes(dtype=torch.float64)
    arguments = {'iou_threshold': 0.3, 'sigma': 0.5, 'min_score': 0.05}
    expected = soft_nms_by_loops(
        boxes.tolist(), scores.tolist(), *arguments.values(), method, offset
    )
    dets, taken = soft_nms(boxes, scores, **arguments, method=method, offset=offset)
    assert taken.tolist() == [index for index, _ in expected]
    assert len(expected) < len(boxes)
    torch.testing.assert_close(dets[:, :4], boxes[taken])
    torch.testing.assert_close(dets[:, 4], torch.tensor([s for _, s in expected]).double())


def test_soft_nms_leaves_its_inputs_alone():
    boxes, scores = random_boxes()
    copies = boxes.clone(), scores.clone()
    soft_nms(boxes, scores, method='gaussian')
    assert torch.equal(boxes, copies[0])
    assert torch.equal(scores, copies[1])


def test_soft_nms_takes_boxes_without_area():
    boxes = torch.tensor([[3.0, 1, 3, 1], [3, 1, 3, 1], [0, 0, 2, 2]])
    dets, taken = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), method='gaussian')
    assert taken.tolist() == [0, 1, 2]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.8, 0.7]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_soft_nms_of_half_precision_lowers_scores_in_float32(dtype):
    boxes, scores = random_boxes(dtype=dtype)
    scores = torch.randperm(len(scores)).to(dtype) / 64
    dets, taken = soft_nms(boxes, scores, method='linear')
    exact, exact_taken = soft_nms(boxes.float(), scores.float(), method='linear')
    assert torch.equal(taken, exact_taken)
    assert dets.dtype == dtype
    assert torch.equal(dets, exact.to(dtype))


def test_nms_match_equals_explicit_loops():
    boxes, scores = random_boxes()
    rows = boxes.tolist()
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    expected = []
    while order:
        best = order.pop(0)
        group = [i for i in order if iou(rows[best], rows[i]) >= 0.4]
        order = [i for i in order if i not in group]
        expected.append([best, *group])
    groups = nms_match(torch.cat([boxes, scores[:, None]], 1), 0.4)
    assert [group.tolist() for group in groups] == expected
    assert any(len(group) > 2 for group in expected)


def test_nms_family_takes_numpy_arrays():
    boxes, scores = random_boxes()
    dets = torch.cat([boxes, scores[:, None]], 1)
    kept = nms(boxes.numpy(), scores.numpy(), 0.5)[1]
    taken = soft_nms(boxes.numpy(), scores.numpy(), 0.5)[1]
    groups = nms_match(dets.numpy(), 0.5)
    assert isinstance(kept, np.ndarray)
    assert kept.tolist() == nms(boxes, scores, 0.5)[1].tolist()
    assert taken.tolist() == soft_nms(boxes, scores, 0.5)[1].tolist()
    assert [g.tolist() for g in groups] == [g.tolist() for g in nms_match(dets, 0.5)]


def test_nms_family_of_no_boxes_is_empty():
    boxes, scores = torch.zeros(0, 4), torch.zeros(0)
    assert nms(boxes, scores, 0.5)[0].shape == (0, 5)
    assert soft_nms(boxes, scores)[0].shape == (0, 5)
    assert stand_in.nms_match(torch.zeros(0, 5), 0.5) == []


def test_nms_takes_boxes_that_require_gradients():
    boxes, scores = random_boxes()
    dets, kept = nms(boxes.requires_grad_(), scores, 0.5)
    dets.sum().backward()
    assert boxes.grad.sum() == 4 * len(kept)
