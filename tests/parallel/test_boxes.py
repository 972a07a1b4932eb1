"""Any run of any box comes out of any other runs that cover it."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.parallel.rectangles import Box, Rectangle, overlaps, rectangles, shape_of, shard, whole

sizes = st.integers(1, 9)


def view(run: torch.Tensor, part: Rectangle) -> torch.Tensor:
    return run[part.offset :].as_strided(part.shape, (part.stride, 1))


def flattened(logical: torch.Tensor, box: Box) -> torch.Tensor:
    return logical[tuple(slice(*span) for span in box)].flatten().contiguous()


@st.composite
def runs(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Box, int, int]:
    """A box of a tensor and a run of its elements, perhaps empty."""
    spans = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        spans.append((start, draw(st.integers(start + 1, size))))
    numel = math.prod(shape_of(tuple(spans)))
    start = draw(st.integers(0, numel))
    return tuple(spans), start, draw(st.integers(0, numel - start))


@given(st.data(), st.one_of(st.tuples(sizes), st.tuples(sizes, sizes)))
def test_the_rectangles_of_a_run_are_its_elements(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    logical = torch.arange(math.prod(shape)).view(shape)
    box, start, numel = data.draw(runs(shape))
    run = flattened(logical, box)[start : start + numel]
    matrix = logical.view(1, -1) if len(shape) == 1 else logical
    parts = rectangles(box, start, numel)
    assert sum(part.numel for part in parts) == numel
    for part in parts:
        assert torch.equal(view(run, part), matrix[part.top : part.bottom, part.left : part.right])


@given(st.data(), st.one_of(st.tuples(sizes), st.tuples(sizes, sizes)))
def test_what_two_runs_share_is_found_once_and_in_the_right_place(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    logical = torch.arange(math.prod(shape)).view(shape)
    (mine, my_start, my_numel), (theirs, their_start, their_numel) = (
        data.draw(runs(shape)),
        data.draw(runs(shape)),
    )
    wanted = flattened(logical, mine)[my_start : my_start + my_numel]
    given_run = flattened(logical, theirs)[their_start : their_start + their_numel]
    copied = torch.full_like(wanted, -1)
    pairs = list(
        overlaps(rectangles(mine, my_start, my_numel), rectangles(theirs, their_start, their_numel))
    )
    for here, there in pairs:
        view(copied, here).copy_(view(given_run, there))
    shared = torch.isin(wanted, given_run)
    assert torch.equal(copied, torch.where(shared, wanted, -1))
    assert sum(here.numel for here, _ in pairs) == shared.sum()


def test_shards_of_a_dimension_are_the_whole() -> None:
    assert whole((4, 6)) == ((0, 4), (0, 6))
    assert [shard((4, 6), 1, rank, 3) for rank in range(3)] == [
        ((0, 4), (0, 2)),
        ((0, 4), (2, 4)),
        ((0, 4), (4, 6)),
    ]
    assert [shard((4,), 0, rank, 2) for rank in range(2)] == [((0, 2),), ((2, 4),)]
