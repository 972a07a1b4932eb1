"""A run of tokens in a file, with the starts of its documents: what a token stream is made of."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class DocumentStarts(Protocol):
    """Where documents begin in a segment: positions in tokens, ascending."""

    def __len__(self) -> int: ...

    def count(self, position: int) -> int:
        """Return how many documents begin at or before a position."""

    def between(self, first: int, last: int) -> np.ndarray:
        """Return the positions of documents [first, last): int64."""


class StoredStarts:
    """Starts as an array of positions."""

    def __init__(self, positions: np.ndarray) -> None:
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def count(self, position: int) -> int:
        """Return how many documents begin at or before a position."""
        # A scalar of the array's type: with another, searchsorted would convert the whole array.
        wanted = self._positions.dtype.type(position)
        return int(np.searchsorted(self._positions, wanted, side="right"))

    def between(self, first: int, last: int) -> np.ndarray:
        """Return the positions of documents [first, last): int64."""
        return self._positions[first:last].astype(np.int64)


class SearchedStarts:
    """Those of a sequence of starts in a file that are in [low, high), without a copy of it."""

    def __init__(self, starts: Sequence[int], low: int, high: int) -> None:
        self._starts = starts
        self._low = low
        self._first = bisect_left(starts, low)
        self._last = bisect_left(starts, high)

    def __len__(self) -> int:
        return self._last - self._first

    def count(self, position: int) -> int:
        """Return how many documents begin at or before a position."""
        found = bisect_right(self._starts, self._low + position, self._first, self._last)
        return found - self._first

    def between(self, first: int, last: int) -> np.ndarray:
        """Return the positions of documents [first, last): int64."""
        places = range(self._first + first, self._first + last)
        return np.array([self._starts[place] - self._low for place in places], np.int64)


@dataclass(frozen=True)
class Segment:
    """`tokens` ids of type `dtype` from byte `first_byte` of a file on.

    `bounds` are where runs of targets begin and end in turn; None: every token is one.
    """

    file: Path
    dtype: np.dtype
    tokens: int
    starts: DocumentStarts
    first_byte: int = 0
    bounds: DocumentStarts | None = None

    def open(self) -> np.ndarray:
        """Map the ids into memory."""
        return np.memmap(
            self.file, self.dtype, mode="r", offset=self.first_byte, shape=(self.tokens,)
        )
