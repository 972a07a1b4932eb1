"""The hyperbolic tangent in Triton, for soft caps: softcap * tanh(x / softcap) (Gemma 2, sec. 2).

Written out, because Triton's interpreter has no libdevice.
"""

# Triton compiles these functions for the types of each launch; it ignores annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import math

import triton
import triton.language as tl

_TWO_LOG2_E = tl.constexpr(2.0 * math.log2(math.e))


@triton.jit
def tanh(x, NEAR_ZERO: tl.constexpr):
    """Return tanh(x) in fp32.

    The error is about 2^-23 of the result with NEAR_ZERO. Without it, the error is 2^-23 of 1,
    which costs fewer instructions and is enough for scores of 16-bit operands.
    """
    result = 1.0 - 2.0 / (1.0 + tl.math.exp2(x * _TWO_LOG2_E))
    if NEAR_ZERO:
        # The difference above cancels. An odd polynomial, fitted for the least relative error on
        # |x| < 0.6 (3e-9), does not.
        square = x * x
        rest = 0.02080558 - 0.00590612 * square
        rest = 0.13331959 + square * (-0.05378673 + square * rest)
        rest = square * (-0.33333299 + square * rest)
        result = tl.where(tl.abs(x) < 0.6, x + x * rest, result)
    return result
