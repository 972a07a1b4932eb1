"""Layers shared by ranks train exactly as one plain process does, and send what the formulas say."""

import math
from pathlib import Path
from typing import Any

import pytest

from megagpt import boxes
from tests import plain
from tests.collectives import Traffic
from tests.configurations import Config, tiny, with_zero
from tests.conftest import HAS_GPU
from tests.ranks import RankPool
from tests.shards import whole_tensors
from tests.test_equality import (
    STEPS,
    WRAPPERS,
    assert_a_rank_holds_and_reduces_its_share,
    assert_equal_training,
    nvme_sized,
)

LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "position": "rotary", "num_kv_heads": 2, "tie_embeddings": False}
INTERLEAVED = {"schedule": "interleaved", "virtual_stages": 2}
MICRO_BATCHES, TOKENS, WIDTH = 4, 2 * 16, 32  # of a rank and step; of a micro-batch; of the residual stream


def shared(
    ranks: int, stage: int, parallel: dict[str, Any], model: dict[str, Any], zero: tuple[str, str] = ("none", "none")
) -> Config:
    """A run whose step is the same number of micro-batches on each rank, however many replicas there are."""
    replicas = ranks // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    config = with_zero(
        tiny(batch=2 * MICRO_BATCHES * replicas, micro=2, steps=STEPS, **({"num_layers": 3} | model)), stage, *zero
    )
    config["megagpt"]["parallel"] = parallel
    return config


def expected_traffic(layers: int, sequence: bool) -> Traffic:
    """What one rank's layers send over the tensor axis in a step without a pipeline (docs/parallelism.md).

    A block sums twice forward (its two row layers) and twice backward (its two column layers); the embedding sums
    forward, the head backward.
    """
    sums = (4 * layers + 2) * MICRO_BATCHES
    if not sequence:
        return {("tensor", "all_reduce"): (sums, sums * TOKENS * WIDTH)}
    scatters = (4 * layers + 1) * MICRO_BATCHES  # the head sums within its loss
    return {("tensor", "reduce_scatter"): (scatters, scatters * TOKENS * WIDTH)}


def held_elements(rank: dict[str, Any]) -> int:
    """Elements of the boxes that the optimizer state of this rank is cut from."""
    held = {(name, box) for kind, name, box, _, _ in rank["state"] if kind == "weight"}
    return sum(math.prod(boxes.shape_of(box)) for _, box in held)


TWO_RANKS = [
    pytest.param(
        stage, sequence, marks=() if (stage, sequence) in {(0, True), (1, False), (3, True)} else pytest.mark.slow
    )
    for stage in (0, 1, 2, 3)
    for sequence in (False, True)
]


@pytest.mark.parametrize(("stage", "sequence"), TWO_RANKS)
def test_two_ranks_that_share_every_layer_equal_one_plain_process(
    two_ranks: RankPool, stage: int, sequence: bool
) -> None:
    config = shared(2, stage, {"tensor": 2, "sequence": sequence}, {"dropout": 0.1})
    ranks = two_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    assert_equal_training(ranks, plain.train(config, STEPS), 8, tolerance=2e-5)
    for rank in ranks:
        assert rank["evidence"]["wrapper"] == WRAPPERS[stage]
        for key, (calls, elements) in expected_traffic(3, sequence).items():
            norms = int(stage == 0 and not sequence)  # one number more at ZeRO 0
            assert rank["traffic"][key] == (calls + norms, elements + norms)
    matrices = [name for _, name, box, *_ in ranks[0]["state"] if name.endswith("weight") and "norm" not in name]
    assert len(matrices) == 3 * (3 * 4 + 2)
    assert held_elements(ranks[0]) < 0.6 * ranks[0]["evidence"]["whole_elements"]


CELLS = [
    (1, ("cpu", "none"), {"tensor": 2, "sequence": True}, LLAMA),
    (2, ("none", "none"), {"tensor": 2}, LLAMA),
    (3, ("cpu", "cpu"), {"tensor": 2, "sequence": True}, {"dropout": 0.1}),
    (3, ("none", "none"), {"tensor": 2, "pipeline": 2, "sequence": True}, LLAMA),
    (3, ("none", "none"), {"tensor": 2, "pipeline": 2}, {"dropout": 0.1}),
    (1, ("none", "none"), {"tensor": 2, "pipeline": 2} | INTERLEAVED, {"num_layers": 4}),
    (2, ("none", "none"), {"tensor": 2, "pipeline": 2, "gradient_reduction": "per_micro_batch"}, LLAMA),
    (3, ("cpu", "cpu"), {"tensor": 2, "pipeline": 2, "sequence": True}, {}),
    (0, ("none", "none"), {"tensor": 4}, {"vocabulary": 70}),
    (3, ("none", "none"), {"tensor": 4, "sequence": True}, {"vocabulary": 70, "dropout": 0.1}),
]


IN_MAKE_TEST = (1, 2, 3, 5, 8)  # every axis, schedule, stage and offload once


@pytest.mark.parametrize(
    ("stage", "zero", "parallel", "model"),
    [pytest.param(*cell, marks=() if index in IN_MAKE_TEST else pytest.mark.slow) for index, cell in enumerate(CELLS)],
    ids=str,
)
def test_four_ranks_that_share_layers_stages_and_data_equal_one_plain_process(
    four_ranks: RankPool, stage: int, zero: tuple[str, str], parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    config = shared(4, stage, parallel, model, zero)
    ranks = four_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    assert_equal_training(ranks, plain.train(config, STEPS), 8, tolerance=2e-5)
    for rank in ranks:
        assert rank["evidence"]["stage_elements"] < 0.62 * rank["evidence"]["whole_elements"]
        replicas = 4 // (parallel["tensor"] * parallel.get("pipeline", 1))
        assert_a_rank_holds_and_reduces_its_share(rank, stage, zero, parallel, replicas, MICRO_BATCHES)
        assert_hidden_states_crossed(rank["traffic"], parallel, WIDTH)


def assert_hidden_states_crossed(traffic: Traffic, parallel: dict[str, Any], width: int) -> None:
    """In a step: the sums of one block at least over the tensor axis, those of each micro-batch between stages; losses
    and norms are a number each."""
    operation = "reduce_scatter" if parallel.get("sequence") else "all_reduce"
    calls, elements = traffic["tensor", operation]
    assert calls >= 4 * MICRO_BATCHES
    assert elements >= 4 * MICRO_BATCHES * TOKENS * width
    assert (("pipeline", "send") in traffic) == ("pipeline" in parallel)
    if "pipeline" in parallel:
        shares = parallel["tensor"] if parallel.get("sequence") else 1
        assert traffic["pipeline", "send"][1] >= MICRO_BATCHES * TOKENS * width // shares


SEQUENCE, PER_MICRO_BATCH = {"sequence": True}, {"gradient_reduction": "per_micro_batch"}
EIGHT_RANKS = [
    (3, ("none", "none"), SEQUENCE, {}),
    (3, ("cpu", "cpu"), SEQUENCE, {}),
    (3, ("nvme", "cpu"), SEQUENCE, {}),
    (3, ("cpu", "none"), INTERLEAVED | PER_MICRO_BATCH, {}),
    (1, ("none", "none"), INTERLEAVED, {}),  # gpt3_175b_3d.json
    (1, ("cpu", "none"), SEQUENCE | PER_MICRO_BATCH, LLAMA),
    (2, ("none", "none"), SEQUENCE, {}),
    (2, ("none", "none"), INTERLEAVED | PER_MICRO_BATCH, LLAMA),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload", "order", "model"), EIGHT_RANKS, ids=str)
def test_pipeline_2_x_tensor_2_x_data_2(
    request: pytest.FixtureRequest,
    eight_ranks: RankPool,
    tmp_path: Path,
    stage: int,
    offload: tuple[str, str],
    order: dict[str, Any],
    model: dict[str, Any],
) -> None:
    if "nvme" in offload:
        request.getfixturevalue("nvme")
    config = with_zero(tiny(batch=16, micro=2, steps=STEPS, num_layers=4, **model), stage, *offload)
    config = nvme_sized(config, tmp_path)
    if "nvme" in offload:
        config["megagpt"]["model"] |= {"num_layers": 16}  # an eighth of it must still reach 1 MiB
    parallel = config["megagpt"]["parallel"] = {"pipeline": 2, "tensor": 2} | order
    ranks = eight_ranks.run("tests.jobs:train", config=config, steps=STEPS, deadline_s=400)
    shape = config["megagpt"]["model"]
    assert_equal_training(ranks, plain.train(config, STEPS), shape["hidden_size"] // shape["num_heads"], 2e-5)
    for rank in ranks:
        assert rank["evidence"]["stage_elements"] < 0.35 * rank["evidence"]["whole_elements"]
        assert_a_rank_holds_and_reduces_its_share(rank, stage, offload, parallel, 2, MICRO_BATCHES)
        assert_hidden_states_crossed(rank["traffic"], parallel, shape["hidden_size"])


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="the interpreter works on CPU tensors")
@pytest.mark.parametrize("replicas", [1, 2])
def test_interpreted_kernels_inside_pipeline_2_x_tensor_2_x_zero_3(
    request: pytest.FixtureRequest, replicas: int
) -> None:
    pool: RankPool = request.getfixturevalue({1: "four_ranks", 2: "eight_ranks"}[replicas])
    parallel = {"pipeline": 2, "tensor": 2, "sequence": True}
    config = shared(4 * replicas, 3, parallel, {"dropout": 0.1, "num_layers": 2})
    ranks = pool.run("tests.jobs:train_on_interpreted_kernels", config=config, steps=2, deadline_s=400)
    assert_equal_training(ranks, plain.train(config, 2), 8, tolerance=2e-5)
    everywhere = {"norm_forward", "norm_backward", "attention_forward", "attention_backward_keys", "dropout_apply"}
    for rank in ranks:
        assert rank["launches"].keys() >= everywhere
        assert rank["traffic"]["tensor", "reduce_scatter"][0] >= 4 * MICRO_BATCHES
        assert ("data", "reduce_scatter") in rank["traffic"]
        shard, stage = rank["evidence"]["shard_elements"], rank["evidence"]["stage_elements"]
        assert shard == pytest.approx(stage / replicas, rel=0.01)
    assert "cross_entropy_gradient" in ranks[-1]["launches"]


def test_rows_that_pad_the_vocabulary_stay_zero(two_ranks: RankPool) -> None:
    config = shared(2, 3, {"tensor": 2}, {"vocabulary": 70, "tie_embeddings": False})
    ranks = two_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    state = whole_tensors(rank["state"] for rank in ranks)
    for name in ("embedding.tokens.weight", "head.weight"):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            rows = state[kind, name].view(128, WIDTH)
            assert not rows[70:].any()
            assert rows[:70].any(dim=1).all()
