"""Functions of Triton kernels that PyTorch's users would expect to find in triton.language."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from linvis_ops._triton import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
# libdevice flushes subnormal numbers, which saves four instructions a call; the interpreter has
# none of it
_LIBDEVICE = tl.constexpr(not interpreting())


@triton.jit
def exp2(x):
    """Compute 2 ** x to two units in the last place, as 0 below 2 ** -126."""
    if _LIBDEVICE:
        y = libdevice.exp2(x)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def divide(x, y):
    """Compute x / y to two units in the last place, for |y| up to 2 ** 126."""
    if _LIBDEVICE:
        z = libdevice.fast_dividef(x, y)
    else:
        z = x / y
    return z
