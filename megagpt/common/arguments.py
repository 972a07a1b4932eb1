"""Command-line values that say their range: types for argparse, which turns what they refuse
into exit code 2.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


def whole_number(minimum: int) -> Callable[[str], int]:
    """A type for whole numbers from ``minimum`` up."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return parse


def non_negative(text: str) -> float:
    """A type for numbers from 0 up."""
    value = _finite(text)
    if value < 0:
        raise ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> float:
    """A type for numbers above 0."""
    value = _finite(text)
    if value <= 0:
        raise ArgumentTypeError(f"{text} is not above 0")
    return value


def probability(text: str) -> float:
    """A type for numbers above 0 and at most 1."""
    value = _finite(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text} is not a finite number")
    return value
