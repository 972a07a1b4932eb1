"""Rounding to 16 bits inside Triton functions, also correct under the interpreter."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def narrow(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return an fp32 value in ``dtype``, rounded to nearest even.

    The interpreter truncates fp32 to bf16 where the GPU rounds, so there the bits are rounded.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result
