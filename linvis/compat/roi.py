"""RoIAlign of `mmcv._ext` on torchvision, in the calling conventions of `mmcv.ops.roi_align`."""

import torch
import torchvision
from torch import Tensor

from linvis.compat.precision import at_least_float32

# The number by which mmcv.ops.roi_align names average pooling; 0 is maximum pooling.
_AVERAGE = 1


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,  # noqa: ARG001
    argmax_x: Tensor,  # noqa: ARG001
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average bilinear samples of a map in each bin of each region.

    Args:
        input: Shape (N, C, H, W), any floating dtype; half precision is computed in float32.
        rois: (batch index, x1, y1, x2, y2) of each region, shape (R, 5).
        output: Shape (R, C, aligned_height, aligned_width); receives the result.
        argmax_y: Of maximum pooling; not used.
        argmax_x: Of maximum pooling; not used.
        aligned_height: Bins of a region from top to bottom.
        aligned_width: Bins of a region from left to right.
        spatial_scale: Factor from the coordinates of rois to those of the map.
        sampling_ratio: Samples of a bin in each direction; 0 for as many as it has pixels.
        pool_mode: 1 for the average.
        aligned: Whether pixel centres lie at half-integers.

    Raises:
        NotImplementedError: If pool_mode asks for the maximum.
    """
    _check_pool_mode(pool_mode)
    features = at_least_float32(input)
    output.copy_(
        torchvision.ops.roi_align(
            features,
            rois.detach().to(features.dtype),
            (aligned_height, aligned_width),
            spatial_scale,
            sampling_ratio,
            aligned,
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,  # noqa: ARG001
    argmax_x: Tensor,  # noqa: ARG001
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward` with respect to its input, into grad_input.

    Args:
        grad_output: Shape (R, C, aligned_height, aligned_width).
        rois: As in the forward function, like all that is not named here.
        argmax_y: Not used.
        argmax_x: Not used.
        grad_input: Shape (N, C, H, W); receives the result.
        aligned_height: As forward.
        aligned_width: As forward.
        spatial_scale: As forward.
        sampling_ratio: As forward.
        pool_mode: As forward.
        aligned: As forward.

    Raises:
        NotImplementedError: If pool_mode asks for the maximum.
    """
    _check_pool_mode(pool_mode)
    gradient = at_least_float32(grad_output)
    # The operator is linear, so its gradient does not depend on the features. torchvision's public
    # function knows which of its implementations may run under deterministic algorithms.
    with torch.enable_grad():
        features = gradient.new_zeros(grad_input.shape).requires_grad_()
        pooled = torchvision.ops.roi_align(
            features,
            rois.detach().to(features.dtype),
            (aligned_height, aligned_width),
            spatial_scale,
            sampling_ratio,
            aligned,
        )
        grad_input.copy_(torch.autograd.grad(pooled, features, gradient)[0])


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != _AVERAGE:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' has no stand-in: use pool_mode='avg', or install mmcv "
            'with its compiled operators (mmcv._ext).'
        )
