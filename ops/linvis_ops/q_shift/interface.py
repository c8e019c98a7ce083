"""The public function of Q-Shift."""

from torch import Tensor

from linvis_ops import _checks, _dispatch
from linvis_ops.q_shift import op
from linvis_ops.q_shift.reference import q_shift_by_index

NAME = 'q_shift'


def q_shift(x: Tensor, hw: tuple[int, int], *, heads: int = 1, backend: str = 'auto') -> Tensor:
    """Quad-directional token shift: each quarter of the channels comes from one neighbour.

    Quarters in order take the token at the left, right, top and bottom; zero outside the picture.
    A trailing class token passes unshifted, and so do the last channels where the number of
    channels (of a head) is no multiple of four.

    Args:
        x: Tokens in raster order, shape (B, T, C), float32, float16, bfloat16 or float64; T = rows
            * columns, or one more with a class token at the end.
        hw: (rows, columns) of the token grid.
        heads: Equal groups of neighbouring channels, each of which has its own quarters, as in
            VRWKV6.
        backend: 'auto', or one of `available_backends('q_shift')`. 'reference' is the definition in
            differentiable PyTorch.

    Returns:
        Tensor of shape (B, T, C), contiguous, in the dtype of x.

    Raises:
        ValueError: If x is not (B, T, C), hw does not match T, or heads does not divide C.
        TypeError: If x is not a floating-point tensor of a supported dtype, or hw and heads not
            ints.
        BackendUnavailableError: If the named backend cannot run these inputs; the message says why.

    Source:
        Vision-RWKV (Duan et al., 2024); the order of the quarters is that of the authors' code and
        checkpoints, which differs from equation 9 of the paper.
    """
    _checks.check_tensors(NAME, x=x)
    _checks.check_tokens(NAME, x=x)
    _checks.check_grid(NAME, x.shape[1], hw)
    _checks.check_division(NAME, x.shape[2], heads)
    backend = _dispatch.requested_backend(NAME, backend)
    if backend == _dispatch.REFERENCE:
        return q_shift_by_index(x, hw, heads)
    return op.q_shift(x, hw[0], hw[1], heads, False, backend)
