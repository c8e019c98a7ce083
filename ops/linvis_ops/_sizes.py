"""Whole numbers from which launches are made.

Triton's own functions for these serve kernels too, and take microseconds on the host.
"""


def ceil_div(size: int, part: int) -> int:
    """How many parts cover a size."""
    return -(-size // part)


def next_power_of_two(size: int) -> int:
    """The least power of two that is not below a size of at least 1."""
    return 1 << (size - 1).bit_length()
