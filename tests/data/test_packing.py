"""Packs of conversations: each is in one, none is too long, few places stay empty."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import skewed
from megagpt.data.chat.packing import one_each, pack

CAPACITY = 4096


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The room of each pack, by the textbook: one after another, all packs looked at."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda index: rooms[index])] -= length
    return sorted(rooms)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=60),
    capacity=st.integers(40, 100),
    seed=st.integers(0, 2**70),
)
def test_packs_are_those_of_best_fit_decreasing(lengths, capacity, seed):
    packs = pack(np.array(lengths, np.int64), capacity, seed=seed)
    members = [packs.members(index) for index in range(len(packs))]
    assert sorted(n for pack_ in members for n in pack_) == [
        number for number, length in enumerate(lengths) if length
    ]
    rooms = sorted(capacity - sum(lengths[n] for n in pack_) for pack_ in members)
    assert rooms == best_fit_decreasing([n for n in lengths if n], capacity)


@pytest.mark.parametrize("count", [500, 20_000])
def test_packs_fill_95_percent_of_a_skewed_distribution(count):
    lengths = skewed(count, CAPACITY)
    assert np.median(lengths) < lengths.mean() * 0.7
    assert lengths.sum() / (len(pack(lengths, CAPACITY, seed=0)) * CAPACITY) > 0.95


def test_the_seed_decides_who_shares_a_pack():
    lengths = skewed(2000, CAPACITY)
    first, again, other = (pack(lengths, CAPACITY, seed=seed) for seed in (1, 1, 2))
    assert first.order.tolist() == again.order.tolist()
    assert first.order.tolist() != other.order.tolist()
    assert len(first) == len(other)


def test_one_each_leaves_out_what_has_no_place():
    packs = one_each(np.array([3, 0, 5]))
    assert [packs.members(index).tolist() for index in range(len(packs))] == [[0], [2]]
