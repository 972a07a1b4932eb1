"""The order in which torch's schedules run the micro-batches of a pipeline rank.

GPipe (Huang et al. 2019, arXiv 1811.06965), 1F1B and interleaved 1F1B (Narayanan et al. 2021, arXiv
2104.04473, section 2.2). No torch: the planner computes held activations and idle time from it, and
the documentation draws it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


class Action(NamedTuple):
    """The forward or backward of one micro-batch through one stage."""

    forward: bool
    stage: int
    micro_batch: int


def schedule_that_runs(schedule: str, num_stages: int, micro_batches: int) -> str:
    """Return gpipe for 1f1b with fewer micro-batches than stages, else the schedule itself.

    Such a 1F1B has no steady state: it is GPipe, and torch's refuses it.
    """
    return "gpipe" if schedule == "1f1b" and micro_batches < num_stages else schedule


def actions(
    schedule: str, pipeline: int, virtual_stages: int, micro_batches: int
) -> list[list[Action]]:
    """Return each pipeline rank's actions in order; `schedule`: gpipe, 1f1b or interleaved."""
    return [
        actions_of_rank(schedule, rank, pipeline, virtual_stages, micro_batches)
        for rank in range(pipeline)
    ]


def warm_up(
    schedule: str, rank: int, pipeline: int, virtual_stages: int, micro_batches: int
) -> int:
    """Return the number of forwards before a rank begins to alternate.

    gpipe m - 1; 1f1b p - rank - 1; interleaved (v - 1) x round + 2 (p - rank - 1), where a
    round is about p micro-batches. Never more than the forwards of a step. torch's 1F1B says p
    - rank and alternates backward first, which is the same order.
    """
    behind = pipeline - 1 - rank
    if schedule == "gpipe":
        return micro_batches - 1
    if schedule == "1f1b":
        return min(behind, micro_batches - 1)
    ahead = (virtual_stages - 1) * round_length(pipeline, micro_batches) + 2 * behind
    return min(ahead, virtual_stages * micro_batches)


def round_length(pipeline: int, micro_batches: int) -> int:
    """Return the micro-batches that the interleaved schedule sends through one stage at a time."""
    return micro_batches // max(1, micro_batches // pipeline)


@cache
def actions_of_rank(
    schedule: str, rank: int, pipeline: int, virtual_stages: int, micro_batches: int
) -> list[Action]:
    """Return a rank's actions: warm-up forwards, then alternating, then the remaining backwards."""
    warm = warm_up(schedule, rank, pipeline, virtual_stages, micro_batches)
    total = virtual_stages * micro_batches
    length = round_length(pipeline, micro_batches)
    seen: Counter[tuple[bool, int]] = Counter()

    def action(forward: bool, index: int) -> Action:
        turn = (index // length) % virtual_stages
        stage = rank + pipeline * (turn if forward else virtual_stages - 1 - turn)
        seen[forward, stage] += 1
        return Action(forward, stage, seen[forward, stage] - 1)

    order = [action(True, index) for index in range(warm)]
    for index in range(warm, total):
        order += [action(True, index), action(False, index - warm)]
    return order + [action(False, index) for index in range(total - warm, total)]


def micro_batches_to_peak(schedule: str, pipeline: int, micro_batches: int) -> int:
    """Return the micro-batches after which a rank has held its maximum; then the schedule repeats.

    Warm-up takes at most v + 1 rounds of forwards, which is less than three rounds through v
    stages.
    """
    if schedule == "gpipe":
        return micro_batches
    repeats_after = (
        pipeline + 1 if schedule == "1f1b" else 3 * round_length(pipeline, micro_batches)
    )
    return min(micro_batches, repeats_after)


def peak_held(order: Sequence[Action], weight: Callable[[int], float]) -> float:
    """Return the most that one rank holds at a time.

    A forward through a stage adds the weight of the stage, its backward removes it.
    """
    held = peak = 0.0
    for action in order:
        held += weight(action.stage) if action.forward else -weight(action.stage)
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Span:
    """An action with its start and end, in the unit of the durations."""

    action: Action
    start: float
    end: float


def timeline(
    orders: Sequence[Sequence[Action]],
    forward: Callable[[int], float],
    backward: Callable[[int], float],
    transfer: float = 0.0,
) -> list[list[Span]]:
    """Return when each rank does what, given the durations of each stage and of a transfer.

    A forward waits for the previous stage, a backward for the next stage, and both for the
    rank's own previous action.
    """
    last = max(action.stage for order in orders for action in order)
    ends: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in orders]

    def needs(action: Action) -> Action | None:
        neighbour = action.stage - 1 if action.forward else action.stage + 1
        if neighbour < 0:
            return None
        if neighbour > last:
            return Action(True, action.stage, action.micro_batch)
        return Action(action.forward, neighbour, action.micro_batch)

    progress = True
    while progress:
        progress = False
        for order, done in zip(orders, spans, strict=True):
            for action in order[len(done) :]:
                before = needs(action)
                if before is not None and before not in ends:
                    break
                sent = 0.0 if before is None or before.stage == action.stage else transfer
                arrival = 0.0 if before is None else ends[before] + sent
                start = max(arrival, done[-1].end if done else 0.0)
                duration = forward(action.stage) if action.forward else backward(action.stage)
                ends[action] = start + duration
                done.append(Span(action, start, ends[action]))
                progress = True
    return spans


@cache
def last_end(
    schedule: str,
    pipeline: int,
    virtual_stages: int,
    micro_batches: int,
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    transfer: float,
) -> float:
    """Return when the last action of `timeline` ends, without the spans, which takes far longer."""
    stages = pipeline * virtual_stages
    ends = [-1.0] * (2 * stages * micro_batches)  # forwards, then backwards, of each stage
    orders = _indexed(schedule, pipeline, virtual_stages, micro_batches)
    seconds = [
        *(time for time in forward for _ in range(micro_batches)),
        *(time for time in backward for _ in range(micro_batches)),
    ]
    done = [0] * pipeline
    free = [0.0] * pipeline
    left = sum(map(len, orders))
    while left:
        for rank, order in enumerate(orders):
            position, now = done[rank], free[rank]
            for index, needed, sent in order[position:]:
                if needed >= 0:
                    arrival = ends[needed]
                    if arrival < 0:
                        break
                    if sent:
                        arrival += transfer
                    if arrival > now:
                        now = arrival
                now += seconds[index]
                ends[index] = now
                position += 1
            left -= position - done[rank]
            done[rank], free[rank] = position, now
    return max(free)


@cache
def _indexed(
    schedule: str, pipeline: int, virtual_stages: int, micro_batches: int
) -> list[list[tuple[int, int, bool]]]:
    """Return each rank's actions as (index, index of the action it waits for or -1, is it sent)."""
    last = pipeline * virtual_stages - 1

    def index(forward: bool, stage: int, micro_batch: int) -> int:
        return ((0 if forward else last + 1) + stage) * micro_batches + micro_batch

    def indexed(action: Action) -> tuple[int, int, bool]:
        forward, stage, micro_batch = action
        own = index(forward, stage, micro_batch)
        if forward and stage == 0:
            return own, -1, False
        if not forward and stage == last:
            return own, index(True, stage, micro_batch), False
        return own, index(forward, stage - 1 if forward else stage + 1, micro_batch), True

    orders = actions(schedule, pipeline, virtual_stages, micro_batches)
    return [[indexed(action) for action in order] for order in orders]


def bubble(spans: Sequence[Sequence[Span]]) -> float:
    """Return the idle share of the ranks' time, from the first start to the last end, 0 to 1."""
    length = max(span.end for rank in spans for span in rank)
    busy = sum(span.end - span.start for rank in spans for span in rank)
    return 1 - busy / (length * len(spans))


def bubble_formula(pipeline: int, virtual_stages: int, micro_batches: int) -> float:
    """Return the idle share with equal stages: (p - 1) / (v m + p - 1).

    Narayanan et al. 2021, section 2.2.
    """
    return (pipeline - 1) / (virtual_stages * micro_batches + pipeline - 1)
