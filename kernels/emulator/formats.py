"""The types of PTX as numpy arrays, and how numbers are rounded to them.

PTX ISA, "Fundamental Types", "Packed Data Types" and "Alternate Floating-Point Data Formats".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

NAN_BF16 = 0x7FFF  # "canonical NaN": every bit set but the sign's


def bf16_to_float(x: Array) -> Array:
    """Return bf16 numbers, given as 16-bit words, in fp32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(x: Array) -> Array:
    """Round fp32 to the nearest bf16, ties to even, as 16-bit words."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), NAN_BF16, rounded).astype(np.uint16)


def float_to_tf32(x: Array) -> Array:
    """Round fp32 to the nearest tf32 (10 bits of mantissa), ties away from zero, in fp32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def flush(x: Array) -> Array:
    """Replace subnormal fp32 numbers by zeros of their sign (``.ftz``)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c in fp32, rounded once.

    The product is exact in fp64. The sum is rounded to fp64 and then to fp32, which differs from
    one rounding only where fp64 lands halfway between two fp32 numbers; there the first rounding
    is undone. (Results below 2^-126 may still be rounded twice.)
    """
    product = a.astype(np.float64) * b
    wide = c.astype(np.float64)
    total = product + wide
    halfway = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if halfway.any():
        part = total - product
        lost = (product - (total - part)) + (wide - part)  # exact (Knuth)
        moved = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(halfway & (lost != 0), moved, total)
    return total.astype(np.float32)


@dataclass(frozen=True)
class Format:
    """A type of PTX: how its registers are seen, and the numbers that arithmetic sees.

    A packed type is seen as its halves, so an array of it has twice as many elements.
    """

    name: str
    bits: int  # of the register
    view: Any  # numpy's type
    widen: Callable[[Array], Array] | None = None
    narrow: Callable[[Array], Array] | None = None
    packed: int = 1

    @property
    def is_float(self) -> bool:
        """Whether arithmetic on it rounds."""
        return self.name.startswith(("f", "bf"))


def _to_half(x: Array) -> Array:
    return np.asarray(x).astype(np.float16)


def _from_half(x: Array) -> Array:
    return x.astype(np.float32)


_INTEGERS: dict[str, Any] = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16,
    "b16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64,
    "s64": np.int64, "b64": np.uint64,
}  # fmt: skip
FORMATS = {
    name: Format(name, 8 * np.dtype(view).itemsize, view) for name, view in _INTEGERS.items()
} | {
    "pred": Format("pred", 1, np.bool_),
    "f16": Format("f16", 16, np.float16, _from_half, _to_half),
    "bf16": Format("bf16", 16, np.uint16, bf16_to_float, float_to_bf16),
    "f16x2": Format("f16x2", 32, np.float16, _from_half, _to_half, packed=2),
    "bf16x2": Format("bf16x2", 32, np.uint16, bf16_to_float, float_to_bf16, packed=2),
    "f32": Format("f32", 32, np.float32),
    "f64": Format("f64", 64, np.float64),
}
UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
STORAGE: dict[int, Any] = {
    1: np.bool_,
    8: np.uint16,
    **{bits: UNSIGNED[bits] for bits in (16, 32, 64)},
}
