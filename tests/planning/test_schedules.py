"""The schedules of the planner are torch's own, action for action."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from megagpt.planning.schedules import (
    Action,
    actions,
    actions_of_rank,
    bubble,
    bubble_formula,
    micro_batches_to_peak,
    peak_held,
    timeline,
)

SIZES = [(2, 4), (4, 4), (4, 8), (3, 7)]  # ranks, micro-batches
INTERLEAVED = [
    (2, 2, 4),
    (4, 2, 8),
    (4, 3, 8),
    (2, 2, 2),
    (4, 2, 10),
    (4, 2, 3),
    (16, 3, 48),
]  # ranks, stages of each


def torch_order(order: list[Any]) -> list[Action]:
    """Passes only: neither waiting nor the reductions, which are DeepSpeed's here."""
    forward, backward = (
        torch_schedules._ComputationType.FORWARD,
        torch_schedules._ComputationType.FULL_BACKWARD,
    )
    passes = [
        action
        for action in order
        if action is not None and action.computation_type in (forward, backward)
    ]
    return [
        Action(a.computation_type == forward, a.stage_index, a.microbatch_index) for a in passes
    ]


class RecordingStage:
    """Stands where a schedule expects a stage, and notes what it is asked to do."""

    def __init__(self, index: int) -> None:
        self.stage_index, self.done = index, list[Action]()

    def forward_one_chunk(self, micro_batch: int, *inputs: Any, **options: Any) -> None:
        self.done.append(Action(True, self.stage_index, micro_batch))

    def backward_one_chunk(self, micro_batch: int, **options: Any) -> None:
        self.done.append(Action(False, self.stage_index, micro_batch))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: []  # nothing to send, to receive or to reduce


@pytest.mark.parametrize(("pipeline", "micro_batches"), SIZES)
@pytest.mark.parametrize(
    ("name", "schedule"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")]
)
def test_one_stage_a_rank_runs_as_in_torch(
    name: str, schedule: str, pipeline: int, micro_batches: int
) -> None:
    for rank in range(pipeline):
        stage, theirs = RecordingStage(rank), object.__new__(getattr(torch_schedules, schedule))
        theirs._stage, theirs._num_stages, theirs._n_microbatches = stage, pipeline, micro_batches
        theirs._internal_losses, theirs._loss_fn, theirs.scale_grads, theirs._has_backward = (
            [],
            None,
            False,
            True,
        )
        theirs._check_inputs = lambda *inputs: ([()] * micro_batches, [{}] * micro_batches)
        for silenced in (
            "_initialize_stage",
            "_maybe_compute_loss",
            "_maybe_get_loss",
            "_update_losses",
        ):
            setattr(theirs, silenced, lambda *arguments: None)
        theirs._step_microbatches()
        assert actions(name, pipeline, 1, micro_batches)[rank] == stage.done


@pytest.mark.parametrize(("pipeline", "virtual_stages", "micro_batches"), INTERLEAVED)
def test_interleaved_stages_run_as_in_torch(
    pipeline: int, virtual_stages: int, micro_batches: int
) -> None:
    theirs = object.__new__(torch_schedules.ScheduleInterleaved1F1B)
    theirs.pp_group_size, theirs.n_local_stages, theirs._n_microbatches = (
        pipeline,
        virtual_stages,
        micro_batches,
    )
    theirs.number_of_rounds = max(1, micro_batches // pipeline)
    theirs.microbatches_per_round = micro_batches // theirs.number_of_rounds
    orders = [
        torch_order(theirs._calculate_single_rank_operations(rank)) for rank in range(pipeline)
    ]
    assert actions("interleaved", pipeline, virtual_stages, micro_batches) == orders


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
@pytest.mark.parametrize("pipeline", [2, 4])
def test_equal_stages_idle_as_the_formula_says(schedule: str, pipeline: int) -> None:
    virtual = 2 if schedule == "interleaved" else 1
    spans = timeline(actions(schedule, pipeline, virtual, 8), lambda stage: 1, lambda stage: 2)
    assert bubble(spans) == pytest.approx(bubble_formula(pipeline, virtual, 8))


def test_a_slow_stage_and_slow_transfers_are_waited_for() -> None:
    orders = actions("1f1b", 2, 1, 4)
    uneven = timeline(orders, lambda stage: 1 + stage, lambda stage: 2 + 2 * stage)
    assert (
        max(span.end for rank in uneven for span in rank) == 1 + 4 * (2 + 4) + 2
    )  # the second stage never waits
    late = timeline(orders, lambda stage: 1, lambda stage: 1, transfer=0.5)
    assert late[1][0].start == 1.5


def test_held_micro_batches() -> None:
    def held(schedule: str, virtual: int) -> list[float]:
        return [peak_held(order, lambda stage: 1) for order in actions(schedule, 4, virtual, 8)]

    assert held("1f1b", 1) == [4, 3, 2, 1]
    assert held("gpipe", 1) == [8, 8, 8, 8]
    assert held("interleaved", 2) == [
        4 + 6 + 1,
        4 + 4 + 1,
        4 + 2 + 1,
        4 + 1,
    ]  # warm-up and the one at work


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 40), st.data())
def test_the_peak_comes_early(
    pipeline: int, virtual: int, micro_batches: int, data: st.DataObject
) -> None:
    rounds = max(1, micro_batches // pipeline)
    kinds = (
        ["gpipe"]
        + ["1f1b"] * (micro_batches >= pipeline)
        + ["interleaved"] * (micro_batches % rounds == 0)
    )
    schedule = data.draw(st.sampled_from(kinds))
    virtual = virtual if schedule == "interleaved" else 1
    rank = data.draw(st.integers(0, pipeline - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weights = (0.5 + torch.rand(pipeline * virtual, generator=generator)).tolist()
    few = micro_batches_to_peak(schedule, pipeline, micro_batches)
    peaks = [
        peak_held(actions_of_rank(schedule, rank, pipeline, virtual, count), weights.__getitem__)
        for count in (few, micro_batches)
    ]
    assert peaks[0] == pytest.approx(peaks[1])
