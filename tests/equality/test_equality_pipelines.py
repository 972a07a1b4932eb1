"""Longer pipelines, more stages a rank, and what runs inside stages: all equal to one plain
process, all acting.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.config import RunConfig
from megagpt.model import GPT, initialise_
from tests.support import plain
from tests.support.configurations import Config, tiny, with_zero
from tests.support.equality import STEPS, WRAPPERS, assert_equal_training
from tests.support.ranks import RankPool
from tests.support.shards import whole_tensors

SLOW = pytest.mark.slow
INTERLEAVED = {"schedule": "interleaved"}
SHARED = {"tensor": 2, "sequence": True}


def pipelined(
    ranks: int,
    micro_batches: int,
    stage: int,
    parallel: dict[str, Any],
    zero: tuple[str, str] = ("none", "none"),
    **model: Any,
) -> Config:
    replicas = ranks // (parallel["pipeline"] * parallel.get("tensor", 1))
    config = with_zero(
        tiny(batch=2 * micro_batches * replicas, micro=2, steps=STEPS, **model), stage, *zero
    )
    config["megagpt"]["parallel"] = parallel
    return config


CASES = [  # ranks, micro-batches of a rank, ZeRO stage, parallel, (optimizer, parameters), model
    (4, 8, 3, {"pipeline": 4}, ("none", "none"), {"num_layers": 4}),
    pytest.param(
        4, 2, 3, {"pipeline": 4}, ("cpu", "cpu"), {"num_layers": 5, "dropout": 0.1}, marks=SLOW
    ),
    pytest.param(
        4,
        20,
        1,
        {"pipeline": 4, "schedule": "gpipe"},
        ("none", "none"),
        {"num_layers": 6},
        marks=SLOW,
    ),
    pytest.param(
        4,
        8,
        2,
        {"pipeline": 4, "virtual_stages": 2} | INTERLEAVED,
        ("cpu", "none"),
        {"num_layers": 9},
        marks=SLOW,
    ),
    pytest.param(3, 5, 1, {"pipeline": 3}, ("none", "none"), {"num_layers": 4}, marks=SLOW),
    pytest.param(
        3,
        6,
        3,
        {"pipeline": 3},
        ("none", "none"),
        {"num_layers": 7, "tie_embeddings": False},
        marks=SLOW,
    ),
    pytest.param(
        4,
        4,
        3,
        {"pipeline": 2, "virtual_stages": 3} | INTERLEAVED,
        ("none", "none"),
        {"num_layers": 7},
        marks=SLOW,
    ),
    pytest.param(
        4,
        8,
        1,
        {"pipeline": 2, "virtual_stages": 3} | INTERLEAVED,
        ("cpu", "none"),
        {"num_layers": 6},
        marks=SLOW,
    ),
    pytest.param(
        4,
        1,
        2,
        {"pipeline": 2, "virtual_stages": 3} | INTERLEAVED,
        ("none", "none"),
        {"num_layers": 6},
        marks=SLOW,
    ),
    pytest.param(4, 16, 3, {"pipeline": 2}, ("cpu", "none"), {"num_layers": 3}, marks=SLOW),
    pytest.param(
        4, 4, 2, {"pipeline": 2}, ("cpu", "none"), {"num_layers": 3, "dropout": 0.1}, marks=SLOW
    ),
]


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Any:
    """Ranks by their number."""
    return request.getfixturevalue("pools").get


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "stage", "parallel", "zero", "model"), CASES, ids=str
)
def test_a_pipeline_equals_one_plain_process(
    pool: Any,
    ranks: int,
    micro_batches: int,
    stage: int,
    parallel: dict[str, Any],
    zero: tuple[str, str],
    model: dict[str, Any],
) -> None:
    config = pipelined(ranks, micro_batches, stage, parallel, zero, **model)
    results = pool(ranks).run(
        "tests.support.jobs.training:train", config=config, steps=STEPS, deadline_s=400
    )
    assert_equal_training(results, plain.train(config, STEPS), 8, tolerance=2e-5)
    replicas = ranks // (parallel["pipeline"] * parallel.get("tensor", 1))
    last = parallel["pipeline"] * parallel.get("virtual_stages", 1) - 1
    for rank, result in enumerate(results):
        seen, traffic = result["evidence"], result["traffic"]
        assert seen["wrapper"] == WRAPPERS[stage]
        assert seen["optimizer_offloaded"] == (zero[0] == "cpu")
        assert seen["parameters_offloaded"] == (zero[1] == "cpu")
        assert seen["master_elements"] == pytest.approx(seen["stage_elements"] / replicas, rel=0.02)
        pipeline_rank = rank * parallel["pipeline"] // ranks
        stages = range(pipeline_rank, last + 1, parallel["pipeline"])
        neighbours = sum((stage > 0) + (stage < last) for stage in stages)
        assert traffic["pipeline", "send"][0] == neighbours * micro_batches
    sizes = [result["evidence"]["stage_elements"] for result in results]
    assert (
        sum(sizes) * parallel.get("tensor", 1)
        >= 0.99 * results[0]["evidence"]["whole_elements"] * replicas
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "parallel"), [(3, {}), (1, SHARED), (2, {"virtual_stages": 2} | INTERLEAVED)], ids=str
)
def test_recomputation_inside_stages_equals_one_plain_process_and_keeps_less(
    four_ranks: RankPool, stage: int, parallel: dict[str, Any]
) -> None:
    kept = {}
    for recompute in ("none", "selective", "full"):
        config = pipelined(4, 4, stage, {"pipeline": 2} | parallel, num_layers=5, dropout=0.1)
        config["megagpt"]["training"]["recompute"] = recompute
        ranks = four_ranks.run("tests.support.jobs.training:train", config=config, steps=STEPS)
        assert_equal_training(ranks, plain.train(config, STEPS), 8, tolerance=2e-5)
        kept[recompute] = four_ranks.run(
            "tests.support.jobs.pipeline:most_kept_bytes", config=config
        )
    for nothing, some, all_blocks in zip(
        kept["none"], kept["selective"], kept["full"], strict=True
    ):
        assert all_blocks < some < nothing


@pytest.mark.parametrize(
    ("stage", "parallel"),
    [
        pytest.param(3, {"pipeline": 2, "virtual_stages": 2} | INTERLEAVED, marks=SLOW),
        pytest.param(1, {"pipeline": 1} | SHARED, marks=SLOW),
        (3, {"pipeline": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_documents_are_masked_on_every_mesh(
    four_ranks: RankPool, stage: int, parallel: dict[str, Any]
) -> None:
    config = pipelined(4, 4, stage, parallel, num_layers=4)
    unmasked = plain.train(config, 1)
    config["megagpt"]["data"] = {"document_mask": True}
    ranks = four_ranks.run("tests.support.jobs.training:train", config=config, steps=STEPS)
    reference = plain.train(config, STEPS)
    assert reference.norms[0] != pytest.approx(unmasked.norms[0], rel=1e-3), (
        "the mask hides nothing"
    )
    assert all(rank["document_bounds"] == 4 for rank in ranks), (
        "bounds are computed once a micro-batch"
    )
    assert_equal_training(ranks, reference, 8, tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("nvme")
@pytest.mark.parametrize("axis", ["pipeline", "tensor"])
def test_parameters_on_nvme_equal_those_in_host_memory(
    two_ranks: RankPool, tmp_path: Path, axis: str
) -> None:
    """Bit for bit, in bf16; without replicas, so that what a rank holds reaches the 1 MiB that
    DeepSpeed swaps.
    """
    shape = {"num_layers": 2, "hidden_size": 512, "sequence_length": 8, "tie_embeddings": False}
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    places = {
        "cpu": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        "nvme": {
            "offload_optimizer": on_disk,
            "offload_param": on_disk | {"max_in_cpu": 0, "buffer_size": 2**21},
        },
    }
    runs = {}
    for name, place in places.items():
        config = tiny(batch=8, micro=2, steps=2, **shape) | {"bf16": {"enabled": True}}
        config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0} | place
        config["megagpt"]["parallel"] = {axis: 2}
        runs[name] = two_ranks.run("tests.support.jobs.training:train", config=config, steps=2)
    assert [r.loss for r in runs["nvme"][0]["results"]] == [
        r.loss for r in runs["cpu"][0]["results"]
    ]
    assert [r.loss for r in runs["cpu"][0]["results"]] == pytest.approx(
        plain.train(config, 2).losses, rel=1e-2
    )
    in_memory, swapped = (
        whole_tensors(rank["state"] for rank in runs[name]) for name in ("cpu", "nvme")
    )
    for key, values in in_memory.items():
        torch.testing.assert_close(swapped[key], values, rtol=0, atol=1e-7, msg="/".join(key))
    for rank in runs["nvme"]:
        assert any("param" in name for name, _ in rank["evidence"]["swap_files"])
        assert rank["evidence"]["elements_on_nvme"] >= 2 * 512 * 2048 / (
            2 if axis == "tensor" else 1
        )
        assert rank["evidence"]["stage_elements"] < 0.6 * rank["evidence"]["whole_elements"]


MESHES = [
    pytest.param({"pipeline": 4}, marks=SLOW),
    pytest.param({"pipeline": 2, "virtual_stages": 2} | INTERLEAVED, marks=SLOW),
    {"pipeline": 2} | SHARED,
]


@pytest.mark.parametrize("parallel", MESHES, ids=str)
@pytest.mark.parametrize("stage", [pytest.param(1, marks=SLOW), 3])
def test_losses_and_logits_equal_those_of_the_whole_model(
    four_ranks: RankPool, stage: int, parallel: dict[str, Any]
) -> None:
    """Of every rank: the mean loss of a batch, and logits one token after the other, out of a
    cache.
    """
    config = pipelined(4, 4, stage, parallel, num_layers=5, position="rotary")
    prompt = torch.randint(128, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    alone = RunConfig.from_json(json.dumps(config)).resolved(
        world_size=4, vocabulary=None, bf16_native=True
    )
    with torch.no_grad():
        expected = initialise_(GPT(alone.megagpt.model), alone.megagpt.training.seed)(
            torch.tensor([prompt])
        )[0]
    loss = plain.train(config, 1).losses[0]
    for rank_loss, logits in four_ranks.run(
        "tests.support.jobs.pipeline:losses_and_logits", config=config, prompt=prompt
    ):
        assert rank_loss == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(logits, expected[len(prompt) // 2 - 1 :], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [{}, {"virtual_stages": 2} | INTERLEAVED], ids=str)
def test_training_goes_on_alike_after_an_evaluation(
    four_ranks: RankPool, schedule: dict[str, Any]
) -> None:
    """Which gathers ZeRO 3's parameters in another order, and draws no dropout."""
    config = pipelined(4, 4, 3, {"pipeline": 2} | schedule, num_layers=4, dropout=0.1)
    ranks = four_ranks.run(
        "tests.support.jobs.training:train", config=config, steps=STEPS, evaluate=True
    )
    assert_equal_training(ranks, plain.train(config, STEPS), 8, tolerance=2e-5)
