"""The formulas of communication count what ranks really send, axis by axis."""

from typing import Any

import pytest

from megagpt.planning.cost.communication import communication, ring
from megagpt.planning.cost.model_states import shard_of
from tests.planning.test_memory import layout_of, run_on
from tests.support.configurations import KINDS
from tests.support.ranks import RankPool

WAYS = {
    "all_reduce": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "send": 1,
}  # a ring passes a sum round twice


def sent_bytes(traffic: Any, axis: str, ranks: int, element_bytes: int) -> float:
    """What ring algorithms make of the counted calls."""
    share = ring(ranks) if axis != "pipeline" else 1
    counted = {
        operation: elements for (of, operation), (_, elements) in traffic.items() if of == axis
    }
    return (
        share
        * element_bytes
        * sum(WAYS.get(operation, 0) * elements for operation, elements in counted.items())
    )


KEEP_NOTHING = {
    f"stage3_{key}": 0
    for key in ("max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
}


@pytest.mark.rotate(3)
@pytest.mark.parametrize(
    "reduction", ["per_step", pytest.param("per_micro_batch", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("stage", "zero"),
    [(1, {}), pytest.param(2, {}, marks=pytest.mark.slow), (3, {}), (3, KEEP_NOTHING)],
    ids=str,
)
def test_data_axis(two_ranks: RankPool, stage: int, zero: dict[str, Any], reduction: str) -> None:
    config = run_on((1, 2, 1), stage, bf16=False, **zero)
    config["megagpt"]["model"]["tie_embeddings"] = False
    config["megagpt"]["parallel"]["gradient_reduction"] = reduction
    layout = layout_of(config, 2)
    formula = communication(layout, 0, shard_of(layout, 0))
    for rank in two_ranks.run("tests.support.jobs.training:train", config=config, steps=3):
        sent = sent_bytes(rank["traffic"], "data", 2, 4)
        assert sent == pytest.approx(formula.gathers + formula.reductions, rel=0.02)


@pytest.mark.parametrize(
    ("zero", "tolerance"),
    [(KEEP_NOTHING, 0.02), pytest.param({}, 0.5, marks=pytest.mark.slow)],
    ids=["keep nothing", "keep all"],
)
def test_gathers_under_a_pipeline_and_recomputation(
    four_ranks: RankPool, zero: dict[str, Any], tolerance: float
) -> None:
    """What the formula takes to be kept for a whole step is gathered once and a little. The norm
    behind an MLP needs its last matrix once more.
    """
    config = run_on((2, 2, 1), 3, bf16=False, **zero)
    config["megagpt"]["model"] |= KINDS["olmo2"] | {"num_kv_heads": 5, "head_size": 8}
    config["megagpt"]["training"]["recompute"] = "full"
    layout = layout_of(config, 4)
    for index, rank in enumerate(
        four_ranks.run("tests.support.jobs.training:train", config=config, steps=3)
    ):
        formula = communication(layout, index // 2, shard_of(layout, index // 2))
        sent = sent_bytes(rank["traffic"], "data", 2, 4)
        assert sent == pytest.approx(formula.gathers + formula.reductions, rel=tolerance)


@pytest.mark.parametrize(
    ("recompute", "kind"),
    [
        ("none", "olmo2"),
        pytest.param("selective", "gpt2", marks=pytest.mark.slow),
        pytest.param("full", "gpt2", marks=pytest.mark.slow),
        ("full", "olmo2"),
    ],
)
def test_tensor_axis(two_ranks: RankPool, recompute: str, kind: str) -> None:
    """The norms of olmo2 sum over all heads, and follow the MLP."""
    config = run_on((1, 1, 2), 1, bf16=False)
    config["megagpt"]["model"] |= KINDS[kind] | {"head_size": 8}
    config["megagpt"]["training"]["recompute"] = recompute
    layout = layout_of(config, 2)
    formula = communication(layout, 0, shard_of(layout, 0)).tensor
    for rank in two_ranks.run("tests.support.jobs.training:train", config=config, steps=2):
        assert sent_bytes(rank["traffic"], "tensor", 2, 4) == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_pipeline_axis(two_ranks: RankPool, virtual_stages: int) -> None:
    config = run_on((2, 1, 1), 1, bf16=False)
    if virtual_stages > 1:
        config["megagpt"]["model"]["num_layers"] = 4
        config["megagpt"]["parallel"] |= {
            "schedule": "interleaved",
            "virtual_stages": virtual_stages,
        }
    layout = layout_of(config, 2)
    for pipeline_rank, rank in enumerate(
        two_ranks.run("tests.support.jobs.training:train", config=config, steps=2)
    ):
        formula = communication(layout, pipeline_rank, shard_of(layout, pipeline_rank)).pipeline
        assert sent_bytes(rank["traffic"], "pipeline", 2, 4) == pytest.approx(formula, rel=0.05)
