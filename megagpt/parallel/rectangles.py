"""Boxes of a logical tensor and flat runs in them: the geometry of shards and of files.

A box is [from, to) in each dim of the logical tensor: the part that tensor parallelism gives a
rank. ZeRO then cuts the box's row-major elements into flat runs [start, start + numel), at any
place in a row. Two such runs, cut from different boxes, overlap in rectangles.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box of the whole logical tensor."""
    return tuple((0, size) for size in shape)


def shard(shape: tuple[int, ...], dimension: int, rank: int, ranks: int) -> Box:
    """Return one of ``ranks`` equal parts along a dim; ``ranks`` must divide its size."""
    size = shape[dimension] // ranks
    return (
        *whole(shape[:dimension]),
        (rank * size, (rank + 1) * size),
        *whole(shape[dimension + 1 :]),
    )


def shape_of(box: Box) -> tuple[int, ...]:
    """Return the sizes of the box."""
    return tuple(end - start for start, end in box)


@dataclass(frozen=True)
class Rectangle:
    """Rows [top, bottom) and columns [left, right) of a logical matrix, as they lie in a flat run.

    The element (top, left) is at ``offset`` in the run; the next row begins ``stride`` elements
    later.
    """

    top: int
    bottom: int
    left: int
    right: int
    offset: int
    stride: int

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def within(self, other: "Rectangle") -> "Rectangle | None":
        """Return the part that the other covers too, as it lies in this one's run; None if none."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        if top >= bottom or left >= right:
            return None
        offset = self.offset + (top - self.top) * self.stride + left - self.left
        return Rectangle(top, bottom, left, right, offset, self.stride)


def rectangles(box: Box, start: int, numel: int) -> list[Rectangle]:
    """Return the rectangles of the run [start, start + numel) of a box with one or two dims.

    At most three: the rest of a row, whole rows, the start of a row.
    """
    (top, _), (left, right) = box if len(box) == 2 else ((0, 1), *box)
    width = right - left
    end = start + numel
    first_whole, last_whole = -(-start // width), end // width
    if first_whole > last_whole:  # both ends are in the same row
        return [_row(top, left, width, start, end, start)]
    parts = [(start, first_whole * width), (last_whole * width, end)]
    runs = [_row(top, left, width, first, last, start) for first, last in parts if first < last]
    if first_whole < last_whole:
        offset = first_whole * width - start
        runs.append(Rectangle(top + first_whole, top + last_whole, left, right, offset, width))
    return runs


def _row(top: int, left: int, width: int, first: int, last: int, start: int) -> Rectangle:
    """Return elements [first, last) of a box, within one row, of the run that begins at start."""
    row, column = divmod(first, width)
    return Rectangle(
        top + row,
        top + row + 1,
        left + column,
        left + column + last - first,
        offset=first - start,
        stride=width,
    )


def overlaps(
    mine: list[Rectangle], theirs: list[Rectangle]
) -> Iterator[tuple[Rectangle, Rectangle]]:
    """Yield each part that two runs of a logical tensor share, as it lies in mine and in theirs."""
    for own in mine:
        for other in theirs:
            here, there = own.within(other), other.within(own)
            if here is not None and there is not None:
                yield here, there
