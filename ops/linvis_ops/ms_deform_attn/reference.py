"""Multi-scale deformable attention in plain PyTorch: the definition of the operator.

B batch, Q queries, H heads, K channels of a head, L levels, P points, S = sum of rows * columns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `linvis_ops.ms_deform_attn` for inputs that are already checked.

    Arguments and result as there, with the shapes and the starts of the levels as Python integers.
    Half-precision inputs are computed in float32, float64 stays float64.
    """
    batch, _, heads, width = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    dtype = torch.promote_types(torch.promote_types(dtype, attention_weights.dtype), torch.float32)
    # Autocast would choose another dtype for some of the steps below.
    with torch.autocast(value.device.type, enabled=False):
        # grid_sample puts -1 and 1 at the outer edges of the map, the locations put 0 and 1 there.
        grid = (2 * sampling_locations.to(dtype) - 1).transpose(1, 2)  # (B, H, Q, L, P, 2)
        weight = attention_weights.to(dtype).transpose(1, 2)  # (B, H, Q, L, P)
        out = value.new_zeros((batch * heads, width, queries), dtype=dtype)
        for level, ((rows, columns), start) in enumerate(
            zip(spatial_shapes, level_start_index, strict=True)
        ):
            feature = value[:, start : start + rows * columns].to(dtype)  # (B, S_l, H, K)
            sampled = F.grid_sample(
                feature.permute(0, 2, 3, 1).reshape(batch * heads, width, rows, columns),
                grid[:, :, :, level].reshape(batch * heads, queries, points, 2),
                mode='bilinear',
                padding_mode='zeros',
                align_corners=False,
            )  # (B * H, K, Q, P)
            share = weight[:, :, :, level].reshape(batch * heads, 1, queries, points)
            out = out + (sampled * share).sum(-1)
        out = out.view(batch, heads * width, queries).transpose(1, 2)
    return out.to(value.dtype).contiguous()
