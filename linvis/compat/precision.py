"""The dtype in which the stand-ins compute."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor without its graph, in float32 if it is in half precision."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
