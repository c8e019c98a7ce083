"""NMS family of `mmcv._ext` on torchvision and NumPy, in the calling conventions of `mmcv.ops.nms`.

Boxes are (x1, y1, x2, y2). With `offset` 1 a box includes its last pixel: widths are x2 - x1 + 1.
"""

import numpy as np
import torch
import torchvision
from torch import Tensor

from linvis.compat.precision import at_least_float32

# The numbers by which mmcv.ops.nms names the ways of lowering a score.
_NAIVE, _LINEAR, _GAUSSIAN = range(3)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no better box overlaps by more than the threshold, best first.

    Args:
        boxes: Shape (N, 4), any floating dtype.
        scores: Shape (N,).
        iou_threshold: A box goes if its IoU with a kept one is larger.
        offset: 0 or 1.

    Returns:
        int64 indices on the device of boxes.
    """
    boxes = at_least_float32(boxes)
    # A box that includes its last pixel has the areas and overlaps of one a pixel larger.
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Take the best box, lower the scores of those that overlap it, and so on.

    Args:
        boxes: Shape (N, 4), any floating dtype and device; the work is done on the CPU.
        scores: Shape (N,).
        dets: Shape (N, 5); row i receives the i-th box taken and the score that it had then.
        iou_threshold: From this IoU on, method 0 removes a box and method 1 multiplies its score by
            1 - IoU.
        sigma: Method 2 multiplies every score by exp(-IoU^2 / sigma).
        min_score: Boxes whose score falls below are removed.
        method: 0 naive, 1 linear, 2 gaussian.
        offset: 0 or 1.

    Returns:
        int64 indices of the boxes taken, in that order, on the CPU.

    Source:
        Bodla et al., Soft-NMS (arXiv 1704.04503).
    """
    corners = at_least_float32(boxes).cpu().numpy()
    current = at_least_float32(scores).cpu().numpy().astype(corners.dtype)  # a copy
    areas = _areas(corners, offset)
    left = np.arange(len(corners))
    taken: list[int] = []
    taken_scores: list[float] = []
    while left.size:
        position = int(current[left].argmax())
        best = int(left[position])
        taken.append(best)
        taken_scores.append(float(current[best]))
        left = np.delete(left, position)
        iou = _iou(corners, areas, best, left, offset)
        if method == _GAUSSIAN:
            factor = np.exp(-(iou**2) / sigma)
        else:
            factor = np.where(iou >= iou_threshold, 1 - iou if method == _LINEAR else 0, 1)
        current[left] *= factor
        left = left[current[left] >= min_score]
    indices = torch.tensor(taken, dtype=torch.long)
    count = len(taken)
    dets[:count, :4] = boxes[indices.to(boxes.device)].to(dets)
    dets[:count, 4] = torch.tensor(taken_scores).to(dets)
    return indices


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes: one that NMS keeps, then those that it suppresses, in the order of scores.

    Args:
        dets: Boxes and scores, shape (N, 5).
        iou_threshold: A box joins the group of a better one if their IoU is at least this.

    Returns:
        Lists of indices, the group of the best box first.
    """
    array = at_least_float32(dets).cpu().numpy()
    corners = array[:, :4]
    areas = _areas(corners, 0)
    left = np.argsort(-array[:, 4], kind='stable')
    groups: list[list[int]] = []
    while left.size:
        best, left = int(left[0]), left[1:]
        matched = _iou(corners, areas, best, left, 0) >= iou_threshold
        groups.append([best, *left[matched].tolist()])
        left = left[~matched]
    return groups


def _areas(corners: np.ndarray, offset: int) -> np.ndarray:
    return (corners[:, 2] - corners[:, 0] + offset) * (corners[:, 3] - corners[:, 1] + offset)


def _iou(
    corners: np.ndarray, areas: np.ndarray, one: int, others: np.ndarray, offset: int
) -> np.ndarray:
    """IoU of one box with others, shape (len(others),); 0 for two boxes without area."""
    upper_left = np.maximum(corners[one, :2], corners[others, :2])
    lower_right = np.minimum(corners[one, 2:], corners[others, 2:])
    overlap = np.maximum(lower_right - upper_left + offset, 0).prod(1)
    union = areas[one] + areas[others] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
