"""The memory formulas count what real ranks hold, byte for byte; what comes and goes with a step
is bounded.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import RunConfig
from megagpt.planning.cost.memory import rank_memory
from megagpt.planning.cost.model_states import (
    model_states,
    shard_of,
    snapshot,
)
from megagpt.planning.cost.working_memory import gathered_parameters, pipeline_buffers
from megagpt.planning.layout import Layout
from tests.support.configurations import tiny, with_zero
from tests.support.ranks import RankPool

ODD = {
    "num_layers": 3,
    "hidden_size": 35,
    "num_heads": 5,
    "sequence_length": 15,
}  # nothing divides evenly
SHARED = {
    "num_layers": 3,
    "hidden_size": 36,
    "num_heads": 4,
    "sequence_length": 15,
}  # between two tensor ranks
MESHES = [*product((1, 2), repeat=3), (1, 4, 1)][
    1:
]  # pipeline, data, tensor: each of two, two of them, all three
IN_MAKE_TEST = [
    ((2, 2, 1), 2),
    ((1, 2, 2), 3),
    ((2, 1, 2), 1),
    ((2, 1, 2), 3),
]  # those that vary two axes at once
KEPT = ("stage3_max_reuse_distance", "stage3_max_live_parameters", "stage3_prefetch_bucket_size")
STATES = [  # mesh, ZeRO stage, bf16
    *(((1, 2, 1), stage, False) for stage in (0, 1, 2, 3)),
    *(pytest.param(mesh, 0, False, marks=pytest.mark.slow) for mesh in ((1, 1, 2), (1, 2, 2))),
    *(
        pytest.param(
            mesh, stage, True, marks=() if (mesh, stage) in IN_MAKE_TEST else pytest.mark.slow
        )
        for mesh in MESHES
        for stage in (1, 2, 3)
    ),
]


def run_on(
    mesh: tuple[int, int, int], stage: int, bf16: bool = True, micro: int = 2, **zero: Any
) -> dict[str, Any]:
    """A run of two micro-batches a step on a mesh."""
    pipeline, data, tensor = mesh
    config = with_zero(
        tiny(batch=2 * micro * data, micro=micro, **(ODD if tensor == 1 else SHARED)), stage, **zero
    )
    config["megagpt"] |= {
        "parallel": {"pipeline": pipeline, "tensor": tensor},
        "checkpoint": {"asynchronous": True},
    }
    return config | {"bf16": {"enabled": bf16}}


def layout_of(config: dict[str, Any], world_size: int) -> Layout:
    run = RunConfig.from_json(json.dumps(config))
    return Layout.of(run.resolved(world_size=world_size, vocabulary=128, bf16_native=True))


def check(pool: RankPool, config: dict[str, Any]) -> None:
    """Every line of every rank equals its formula; on a CPU all memory is one."""
    layout = layout_of(config, pool.world_size)
    ranks = pool.run("tests.support.jobs.memory:held_states", config=config)
    assert len({held["place"] for held in ranks}) == len(ranks) // layout.tensor
    for held in ranks:
        pipeline_rank, data_rank = held.pop("place")
        most, afterwards = held.pop("pipeline_buffers")
        assert (
            pipeline_buffers(layout, pipeline_rank) / 2
            <= most
            <= pipeline_buffers(layout, pipeline_rank)
        )
        assert afterwards == 0
        copied = snapshot(shard_of(layout, pipeline_rank, data_rank)).host
        saved = held.pop("snapshot")
        assert (
            saved == copied if layout.tensor == 1 else 0 < saved <= copied
        )  # a neighbour saves what both have
        states = model_states(layout, pipeline_rank, data_rank)
        expected = {line: getattr(states, line) for line in held}
        assert held == {line: bytes_.device + bytes_.host for line, bytes_ in expected.items()}


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Any:
    """Pools by their size."""
    return lambda size: request.getfixturevalue(
        {2: "two_ranks", 4: "four_ranks", 8: "eight_ranks"}[size]
    )


@pytest.mark.rotate(3)
@pytest.mark.parametrize(("mesh", "stage", "bf16"), STATES, ids=str)
def test_each_rank_holds_what_the_formula_says(
    ranks: Any, mesh: tuple[int, int, int], stage: int, bf16: bool
) -> None:
    pipeline, data, tensor = mesh
    check(ranks(pipeline * data * tensor), run_on(mesh, stage, bf16))


def test_sequence_parallelism_cuts_what_stages_exchange(four_ranks: RankPool) -> None:
    config = run_on((2, 1, 2), 1)
    config["megagpt"]["model"] |= {"sequence_length": 16}
    config["megagpt"]["parallel"] |= {"sequence": True}
    check(four_ranks, config)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_coalesced_reduction_holds_whole_gradients(two_ranks: RankPool, stage: int) -> None:
    config = run_on((1, 2, 1), stage)
    config["megagpt"]["parallel"]["gradient_reduction"] = "per_step"
    check(two_ranks, config)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_accumulate_in_fp32(two_ranks: RankPool, stage: int) -> None:
    check(two_ranks, run_on((1, 2, 1), stage) | {"data_types": {"grad_accum_dtype": "fp32"}})


@pytest.mark.slow
def test_a_tied_pipeline_accumulates_in_fp32(four_ranks: RankPool) -> None:
    config = run_on((2, 2, 1), 3) | {"data_types": {"grad_accum_dtype": "fp32"}}
    config["megagpt"]["parallel"]["gradient_reduction"] = "per_micro_batch"
    layout = layout_of(config, 4)
    assert (layout.accumulation_bytes, layout.element_bytes, layout.model.tie_embeddings) == (
        4,
        2,
        True,
    )
    for held in four_ranks.run("tests.support.jobs.memory:held_states", config=config):
        gradients = model_states(layout, *held["place"]).reduced_gradients
        assert (
            held["reduced_gradients"]
            == gradients.device + gradients.host
            > 4 * layout.model.num_parameters / 6
        )


OFFLOADED = [
    ((1, 2, 1), 1),
    ((1, 2, 1), 2),
    ((1, 2, 1), 3),
    pytest.param((2, 2, 1), 2, marks=pytest.mark.slow),
]


@pytest.mark.rotate(3)
@pytest.mark.parametrize(("mesh", "stage"), OFFLOADED, ids=str)
def test_an_offloaded_optimizer_needs_gradients_of_its_own(
    ranks: Any, mesh: tuple[int, int, int], stage: int
) -> None:
    check(ranks(mesh[0] * mesh[1]), run_on(mesh, stage, optimizer="cpu"))


def test_small_parameters_stay_whole(two_ranks: RankPool) -> None:
    config = run_on((1, 2, 1), 3, parameters="cpu")
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 105,
        "sub_group_size": 4000,
    }
    states = model_states(layout_of(config, 2), 0)
    assert 0 < states.persistent_parameters.device < states.parameters.host
    check(two_ranks, config)


# what torch allocates to receive into, and who frees it, differs between 2.11 and 2.13
@pytest.mark.both_stacks
def test_interleaved_stages_without_tied_embeddings(two_ranks: RankPool) -> None:
    config = run_on((2, 1, 1), 3)
    config["megagpt"]["parallel"] |= {"schedule": "interleaved", "virtual_stages": 2}
    config["megagpt"]["model"] |= {"num_layers": 5, "tie_embeddings": False}
    check(two_ranks, config)


PIPELINES = [
    {"schedule": "gpipe"},
    *(
        pytest.param(order, marks=pytest.mark.slow)
        for order in ({}, {"schedule": "interleaved", "virtual_stages": 2})
    ),
]


@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", PIPELINES, ids=str)
def test_zero_3_gathers_a_module_at_a_time_in_every_backward(
    four_ranks: RankPool, order: dict[str, Any], recompute: str
) -> None:
    """However many forwards came before it: DeepSpeed alone would leave the second backward's
    whole stage gathered.
    """
    config = with_zero(tiny(batch=16, num_layers=8), 3, **dict.fromkeys(KEPT, 0))
    config["megagpt"]["parallel"] = {"pipeline": 2} | order
    config["megagpt"]["training"]["recompute"] = recompute
    layout = layout_of(config, 4)
    ranks = four_ranks.run("tests.support.jobs.memory:gathered_elements", config=config, steps=3)
    for rank, (most, stage, largest) in enumerate(ranks):
        assert max(most) < 3 * largest < stage / 3
        assert 4 * max(most) <= gathered_parameters(shard_of(layout, rank // 2))


@pytest.mark.slow
def test_interleaved_stages_of_shared_layers(four_ranks: RankPool) -> None:
    config = run_on((2, 1, 2), 2)
    config["megagpt"]["parallel"] |= {"schedule": "interleaved", "virtual_stages": 2}
    config["megagpt"]["model"] |= {"num_layers": 5}
    check(four_ranks, config)


@pytest.mark.slow
@pytest.mark.usefixtures("nvme")
def test_nvme_holds_the_optimizer(two_ranks: RankPool, tmp_path: Path) -> None:
    config = run_on((1, 2, 1), 3)
    config["megagpt"]["model"] |= {"hidden_size": 512, "num_heads": 4, "num_layers": 1}
    config["zero_optimization"] |= {
        "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}
    }
    layout = layout_of(config, 2)
    (on_disk, _) = two_ranks.run(
        "tests.support.jobs.memory:swapped_bytes_after_a_step", config=config
    )
    expected = [model_states(layout, 0, rank) for rank in (0, 1)]
    swapped = sum(s.master_weights.nvme + s.moments.nvme + s.offload_buffers.nvme for s in expected)
    assert swapped > 0
    assert on_disk == pytest.approx(swapped, rel=0.01)  # files are rounded up to whole blocks


ADAPTED = [
    ((1, 2, 1), 0),
    ((1, 2, 1), 1),
    ((1, 2, 2), 2),
    ((2, 1, 2), 3),
    pytest.param((1, 2, 2), 3, marks=pytest.mark.slow),
    pytest.param((2, 2, 1), 3, marks=pytest.mark.slow),
    pytest.param((2, 2, 2), 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("optimizer", ["none", pytest.param("cpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mesh", "stage"), ADAPTED, ids=str)
def test_frozen_weights_have_no_gradient_no_master_and_no_moments(
    ranks: Any, mesh: tuple[int, int, int], stage: int, optimizer: str
) -> None:
    if stage == 0 and optimizer != "none":
        pytest.skip("ZeRO 0 has nothing to offload")
    pipeline, data, tensor = mesh
    config = run_on(mesh, stage, bf16=stage > 0, optimizer=optimizer)
    whole = model_states(layout_of(config, pipeline * data * tensor), 0)
    config["megagpt"]["training"]["lora"] = {"rank": 3, "targets": ["query", "value", "down"]}
    layout = layout_of(config, pipeline * data * tensor)
    states = model_states(layout, 0)
    for line in ("accumulating_gradients", "reduced_gradients", "master_weights", "moments"):
        held, of_all = (getattr(s, line) for s in (states, whole))
        assert held.device + held.host <= (of_all.device + of_all.host) / 10
    check(ranks(pipeline * data * tensor), config)


OFFLOADS = [  # ZeRO stage, optimizer, parameters, bf16, micro-batches
    (1, "cpu", "none", False, 1),
    (1, "cpu", "none", True, 2),
    (2, "cpu", "none", False, 2),
    (2, "cpu", "none", True, 1),
    (3, "cpu", "none", False, 1),
    (3, "cpu", "none", True, 2),
    (3, "cpu", "cpu", False, 2),
    (3, "cpu", "cpu", True, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer", "parameters", "bf16", "count"), OFFLOADS)
def test_the_process_has_the_memory_of_the_plan(
    one_rank: RankPool, stage: int, optimizer: str, parameters: str, bf16: bool, count: int
) -> None:
    """Its own, above its base, within 10 %; without a GPU all of it is the host's. No parameter is
    larger than the bucket, and ZeRO 3 keeps nothing gathered, of which the plan has the most.
    """
    shape = {"hidden_size": 768, "num_heads": 12, "num_layers": 8, "vocab_size": 128}
    config = tiny(batch=count, micro=1, **shape, sequence_length=32)
    keys = {"reduce_bucket_size": 5_000_000} | (dict.fromkeys(KEPT, 0) if stage == 3 else {})
    config = with_zero(config, stage, optimizer, parameters, **keys)
    config |= {"bf16": {"enabled": bf16}}
    (peak,) = one_rank.run("tests.support.jobs.memory:peak_bytes", config=config)
    planned = rank_memory(layout_of(config, 1), 0).peak
    assert peak == pytest.approx(planned.device + planned.host, rel=0.1)
