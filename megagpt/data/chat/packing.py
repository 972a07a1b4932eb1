"""Which conversations share a sample: best fit, the longest first, over the whole split.

A pure function of the lengths and a seed, the same on every rank. It costs numpy operations by the
thousand lengths, not by the million conversations.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Packs(NamedTuple):
    """`order[starts[i]:starts[i + 1]]` are the numbers of the conversations of pack i."""

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members(self, pack: int) -> np.ndarray:
        """Return the numbers of the conversations of a pack, in the order of their places."""
        return self.order[self.starts[pack] : self.starts[pack + 1]]


def one_each(lengths: np.ndarray) -> Packs:
    """Return packs of one conversation; those without a position are left out."""
    order = np.flatnonzero(lengths > 0)
    return Packs(order, np.arange(len(order) + 1))


def pack(lengths: np.ndarray, capacity: int, *, seed: int) -> Packs:
    """Return packs of at most `capacity` positions; no length may exceed it.

    Each conversation, the longest first, goes into the pack with the least room that is enough
    (best-fit decreasing; Johnson et al. 1974: at most 11/9 of the fewest packs, plus 4). `seed`
    decides which of equal lengths comes first. Lengths of 0 are left out.
    """
    numbers = np.argsort(_mixed(np.arange(len(lengths), dtype=np.uint64), seed), kind="stable")
    numbers = numbers[np.argsort(-lengths[numbers], kind="stable")]
    numbers = numbers[lengths[numbers] > 0]
    shelf = _Shelf(capacity)
    runs = np.flatnonzero(np.diff(lengths[numbers], prepend=0, append=0))
    pack_of = [
        shelf.place(int(lengths[numbers[start]]), int(end - start))
        for start, end in itertools.pairwise(runs.tolist())
    ]
    places = np.concatenate([np.empty(0, np.int64), *pack_of])
    by_pack = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[by_pack], np.arange(shelf.packs + 1))
    return Packs(numbers[by_pack], starts)


class _Shelf:
    """Packs by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.packs = 0
        self._capacity = capacity
        self._of_room: dict[int, np.ndarray] = {}
        self._rooms: list[int] = []  # sorted

    def place(self, length: int, count: int) -> np.ndarray:
        """Return the packs of `count` conversations of one length, placed one after another."""
        chosen = []
        while count:
            room, packs = self._take_least_room(length, count)
            # The pack that took one has the least room for the next, until it has too little.
            each = room // length
            placed = np.repeat(packs, each)[:count]
            full, rest = divmod(len(placed), each)
            self._put(room - each * length, packs[:full])
            self._put(room - rest * length, packs[full : full + 1] if rest else packs[:0])
            chosen.append(placed)
            count -= len(placed)
        return np.concatenate(chosen)

    def _take_least_room(self, length: int, count: int) -> tuple[int, np.ndarray]:
        """Take as many packs as are needed of those with the least room; new ones if none has."""
        found = bisect_left(self._rooms, length)
        if found == len(self._rooms):
            new = -(-count // (self._capacity // length))
            self.packs += new
            return self._capacity, np.arange(self.packs - new, self.packs)
        room = self._rooms[found]
        needed = -(-count // (room // length))
        packs = self._of_room[room]
        if needed >= len(packs):
            del self._of_room[room], self._rooms[found]
        else:
            self._of_room[room] = packs[needed:]
        return room, packs[:needed]

    def _put(self, room: int, packs: np.ndarray) -> None:
        """Remember packs with so much room left; full ones are done."""
        if room == 0 or not len(packs):
            return
        if room in self._of_room:
            self._of_room[room] = np.concatenate((self._of_room[room], packs))
        else:
            self._of_room[room] = packs
            insort(self._rooms, room)


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """Return a pseudo-random uint64 for each value: splitmix64 (Steele et al. 2014).

    numpy's own generators may draw other numbers in another version.
    """
    with np.errstate(over="ignore"):
        x = (values + np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
