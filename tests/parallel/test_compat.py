"""What DeepSpeed would wait for without an end is said at once, by every rank
(`megagpt/parallel/compat.py`).
"""

import json

import pytest

from megagpt.config import RunConfig
from megagpt.planning.cost.model_states import tile_counts
from megagpt.planning.layout import Layout
from tests.support.configurations import tiny, with_zero
from tests.support.ranks import RankPool


def test_stages_with_different_numbers_of_tiles_are_refused(two_ranks: RankPool) -> None:
    """The planner refuses them before; here DeepSpeed's own groups are counted."""
    config = with_zero(tiny(num_layers=3), 3, sub_group_size=5000)
    config["megagpt"]["parallel"] = {"pipeline": 2}
    run = RunConfig.from_json(json.dumps(config)).resolved(
        world_size=2, vocabulary=None, bf16_native=True
    )
    counts = tile_counts(Layout.of(run))
    assert len({*counts}) == 2
    for said in two_ranks.run("tests.support.jobs.compat:refused_tiles", config=config):
        assert (
            "zero_optimization.sub_group_size: pipeline stages have different numbers of "
            f"optimizer tiles (found {sorted(counts)}, need equal numbers)" in said
        )


@pytest.mark.parametrize(
    ("pool", "parallel"),
    [("two_ranks", {}), pytest.param("four_ranks", {"pipeline": 2}, marks=pytest.mark.slow)],
    ids=["each forward", "whole steps"],
)
def test_replicas_that_run_different_modules_end(
    request: pytest.FixtureRequest, pool: str, parallel: dict[str, int]
) -> None:
    config = with_zero(tiny(num_layers=4), 3)
    config["megagpt"]["parallel"] = parallel
    ranks: RankPool = request.getfixturevalue(pool)
    places = [
        f"data {data}, tensor 0 (rank {rank},"
        for rank, data in enumerate([0, 1] * (ranks.world_size // 2))
    ]
    said = ranks.run("tests.support.jobs.compat:end_with_other_modules", config=config)
    for place, line in zip(places, said, strict=True):
        assert place in line
        assert line.endswith("data-parallel ranks of one stage ran different modules")


def test_the_copy_of_a_tied_gradient_has_arrived_before_the_update(two_ranks: RankPool) -> None:
    config = with_zero(tiny(tie_embeddings=True), 3, "cpu")
    config["megagpt"]["parallel"] = {"pipeline": 2, "gradient_reduction": "per_micro_batch"}
    for said in two_ranks.run(
        "tests.support.jobs.compat:copies_of_tied_gradients", config=config, steps=2
    ):
        assert said.count("synchronised") == said.count("updated") == 2
        for index, event in enumerate(said):
            if event == "updated":
                assert said[index - 2 : index] == ["copied", "synchronised"]
