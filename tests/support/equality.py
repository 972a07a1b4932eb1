"""What equality tests compare: real ranks with one plain PyTorch process, and what ranks hold
with what they should.
"""

from typing import Any

import pytest
import torch

from megagpt.parity.plain import PlainRun
from megagpt.parity.tolerance import BF16_TOLERANCE, limit_in_bf16, straying
from megagpt.planning.layout import Layout
from megagpt.planning.schedules import actions_of_rank
from tests.support.shards import whole_tensors

STEPS = 4
WRAPPERS = {
    0: "AdamW",
    1: "DeepSpeedZeroOptimizer",
    2: "DeepSpeedZeroOptimizer",
    3: "DeepSpeedZeroOptimizer_Stage3",
}

Ranks = list[dict[str, Any]]


def meaningful(name: str, numel: int, head_size: int | None, rotated: int) -> torch.Tensor:
    """False at key biases: softmax does not see them, so their gradient is rounding noise that Adam
    blows up.

    It does see the first ``rotated`` channels, and all of them without a head size.
    """
    row = torch.arange(numel)
    if head_size is None or not name.endswith("qkv.bias"):
        return row >= 0
    return ((row // head_size) % 3 != 1) | (row % head_size < rotated)


def assert_equal_training(
    ranks: Ranks, reference: PlainRun, head_size: int | None, tolerance: float, rotated: int = 0
) -> None:
    for rank in ranks:
        results = rank["results"]
        assert [r.loss for r in results] == pytest.approx(reference.losses, rel=tolerance)
        assert [r.grad_norm for r in results] == pytest.approx(reference.norms, rel=tolerance)
        assert all(r.applied for r in results)
    for (kind, name), values in whole_tensors(rank["state"] for rank in ranks).items():
        expected = reference.state[kind][name]
        counted = meaningful(name, values.numel(), head_size, rotated)
        scale = (
            (expected - reference.start[name]).abs().max()
            if kind == "weight"
            else expected.abs().max()
        )
        difference = (values - expected).abs()[counted].max() / scale
        assert difference < 500 * tolerance, (
            f"{kind}/{name} differs by {difference:.1e} of its largest change"
        )


def assert_strays_no_further_than_bf16(
    ranks: Ranks, exact: PlainRun, rounded: PlainRun, tokens_per_step: int
) -> None:
    """Than ``megagpt/parity/tolerance.py`` lets a mesh, given the plain process in fp32 and in
    bf16.
    """
    rounding = straying(rounded.losses, rounded.norms, rounded.state["weight"], exact)
    assert 0 < rounding.weights < 0.1
    limit = limit_in_bf16(rounding, exact, tokens_per_step, BF16_TOLERANCE)
    state = whole_tensors(rank["state"] for rank in ranks)
    weights = {name: values for (kind, name), values in state.items() if kind == "weight"}
    for results in (rank["results"] for rank in ranks):
        found = straying(
            [step.loss for step in results], [step.grad_norm for step in results], weights, exact
        )
        assert found.weights > 0
        assert found.within(limit), f"{found}, allowed: {limit}"


def assert_a_rank_holds_and_reduces_its_share(
    rank: dict[str, Any],
    stage: int,
    zero: tuple[str, str],
    parallel: dict[str, Any],
    replicas: int,
    micro_batches: int,
) -> None:
    """Of its stage: one share of the replicas is held, where it was asked to be, and the whole
    is reduced as often as that was asked for. Elements are counted: losses cross the data axis,
    too, a number at a time.
    """
    seen, (optimizer, parameters) = rank["evidence"], zero
    assert seen["wrapper"] == WRAPPERS[stage]
    assert seen["adam"] == ("AdamW" if optimizer == "none" else "DeepSpeedCPUAdam")
    assert seen["optimizer_offloaded"] == (optimizer != "none")
    assert seen["parameters_offloaded"] == (parameters != "none")
    assert bool(seen["swap_files"]) == ("nvme" in zero)
    assert seen["master_elements"] == pytest.approx(
        seen["stage_elements"] / (replicas if stage else 1), rel=0.02
    )
    if stage == 3:
        assert seen["parameter_elements"] == 0
        assert seen["shard_elements"] == pytest.approx(seen["stage_elements"] / replicas, rel=0.02)
    if replicas > 1:
        reduction = parallel.get(
            "gradient_reduction", "per_step" if "pipeline" in parallel else "per_micro_batch"
        )
        times = (
            micro_batches if reduction == "per_micro_batch" and stage > 1 else 1
        )  # ZeRO 1 waits for the last
        operation = "reduce_scatter" if stage == 3 else "all_reduce"
        assert rank["traffic"]["data", operation][1] == pytest.approx(
            times * seen["stage_elements"], rel=0.01
        )


def assert_rank_ran_its_passes(rank: dict[str, Any], layout: Layout, pipeline_rank: int) -> None:
    """Forwards and backwards of the last step, in the order of the schedule; without a pipeline
    there is none.
    """
    size = (layout.pipeline, layout.virtual_stages, layout.micro_batches)
    order = actions_of_rank(layout.schedule, pipeline_rank, *size) if layout.pipeline > 1 else []
    assert rank["passes"] == [(action.forward, action.stage) for action in order]
