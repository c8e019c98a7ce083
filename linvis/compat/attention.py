"""Multi-scale deformable attention of `mmcv._ext` on our own operator."""

import torch
from torch import Tensor

from linvis_ops.ms_deform_attn import ms_deform_attn


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,  # noqa: ARG001
) -> Tensor:
    """`linvis_ops.ms_deform_attn` without a graph; im2col_step, a block size, is not needed."""
    return ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,  # noqa: ARG001
) -> None:
    """Write the gradients of the three floating-point inputs into the tensors given for them."""
    with torch.enable_grad():
        value, sampling_locations, attention_weights = (
            tensor.detach().requires_grad_()
            for tensor in (value, sampling_locations, attention_weights)
        )
        output = ms_deform_attn(
            value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
        gradients = torch.autograd.grad(
            output, (value, sampling_locations, attention_weights), grad_output
        )
    for destination, gradient in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True
    ):
        destination.copy_(gradient)
