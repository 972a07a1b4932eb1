"""Every ZeRO stage with every legal offload trains exactly as one plain PyTorch process does, and really acts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.plain import PlainRun
from tests import plain
from tests.configurations import tiny, with_zero
from tests.ranks import RankPool
from tests.shards import whole_tensors

STEPS = 4
CELLS = [
    (0, "none", "none"),
    (1, "none", "none"),
    (1, "cpu", "none"),
    (2, "none", "none"),
    (2, "cpu", "none"),
    (3, "none", "none"),
    (3, "cpu", "none"),
    (3, "none", "cpu"),
    (3, "cpu", "cpu"),
    (3, "nvme", "none"),
    (3, "nvme", "cpu"),
]
SLOW_CELLS = [cell for cell in CELLS if "nvme" in cell or cell[0] in (1, 2)]  # where micro-batches accumulate
WRAPPERS = {0: "AdamW", 1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


Ranks = list[dict[str, Any]]


def nvme_sized(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Big enough that DeepSpeed really swaps (1 MiB a rank and tile at least), with the disk named."""
    zero = config["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            zero[section]["nvme_path"] = str(directory)
            if section == "offload_param":
                zero[section] |= {"max_in_cpu": 0, "buffer_size": 200_000}
    if "nvme" in json.dumps(zero):
        config["megagpt"]["model"] |= {"hidden_size": 128, "num_layers": 4}
    return config


def meaningful(name: str, numel: int, head_size: int) -> torch.Tensor:
    """False at key biases: softmax does not see them, so their gradient is rounding noise that Adam blows up."""
    row = torch.arange(numel)
    return row >= 0 if not name.endswith("qkv.bias") else (row // head_size) % 3 != 1


def assert_equal_training(ranks: Ranks, reference: PlainRun, head_size: int, tolerance: float) -> None:
    for rank in ranks:
        results = rank["results"]
        assert [r.loss for r in results] == pytest.approx(reference.losses, rel=tolerance)
        assert [r.grad_norm for r in results] == pytest.approx(reference.norms, rel=tolerance)
        assert all(r.applied for r in results)
    for (kind, name), values in whole_tensors(rank["state"] for rank in ranks).items():
        expected, counted = reference.state[kind][name], meaningful(name, values.numel(), head_size)
        scale = (expected - reference.start[name]).abs().max() if kind == "weight" else expected.abs().max()
        difference = (values - expected).abs()[counted].max() / scale
        assert difference < 500 * tolerance, f"{kind}/{name} differs by {difference:.1e} of its largest change"


def assert_mechanism_acted(ranks: Ranks, stage: int, optimizer: str, parameters: str, elements: int) -> None:
    for rank in ranks:
        seen = rank["evidence"]
        assert seen["wrapper"] == WRAPPERS[stage]
        assert seen["adam"] == ("AdamW" if optimizer == "none" else "DeepSpeedCPUAdam")
        assert seen["optimizer_offloaded"] == (optimizer != "none")
        if stage == 3:
            assert seen["parameter_elements"] == 0, "parameters are whole between steps"
            assert elements / len(ranks) <= seen["shard_elements"] < elements / len(ranks) + 100
            assert seen["parameters_offloaded"] == (parameters != "none")
            assert seen["elements_on_nvme"] == 0, "DeepSpeed swaps 16-bit parameters only"
        share = elements if stage == 0 else elements / len(ranks)
        assert seen["master_elements"] == pytest.approx(share, rel=0.02)
        swapped_bytes = sum(size for _, size in seen["swap_files"])
        if optimizer == "nvme":
            assert swapped_bytes >= 3 * 4 * 0.95 * elements, seen["swap_files"]
        elif parameters == "none":
            assert swapped_bytes == 0


def assert_a_rank_holds_and_reduces_its_share(
    rank: dict[str, Any], stage: int, zero: tuple[str, str], parallel: dict[str, Any], replicas: int, micro_batches: int
) -> None:
    """Of its stage: one share of the replicas is held, where it was asked to be, and the whole is reduced as often as
    that was asked for. Elements are counted: losses cross the data axis, too, a number at a time."""
    seen, (optimizer, parameters) = rank["evidence"], zero
    assert seen["wrapper"] == WRAPPERS[stage]
    assert seen["adam"] == ("AdamW" if optimizer == "none" else "DeepSpeedCPUAdam")
    assert seen["optimizer_offloaded"] == (optimizer != "none")
    assert seen["parameters_offloaded"] == (parameters != "none")
    assert bool(seen["swap_files"]) == ("nvme" in zero)
    assert seen["master_elements"] == pytest.approx(seen["stage_elements"] / (replicas if stage else 1), rel=0.02)
    if stage == 3:
        assert seen["parameter_elements"] == 0
        assert seen["shard_elements"] == pytest.approx(seen["stage_elements"] / replicas, rel=0.02)
    if replicas > 1:
        reduction = parallel.get("gradient_reduction", "per_step" if "pipeline" in parallel else "per_micro_batch")
        times = micro_batches if reduction == "per_micro_batch" and stage > 1 else 1  # ZeRO 1 waits for the last
        operation = "reduce_scatter" if stage == 3 else "all_reduce"
        assert rank["traffic"]["data", operation][1] == pytest.approx(times * seen["stage_elements"], rel=0.01)


CASES = [
    pytest.param(*cell, accumulation, marks=pytest.mark.slow if cell in SLOW_CELLS and accumulation > 1 else ())
    for cell in CELLS
    for accumulation in (1, 3)
]


@pytest.mark.parametrize(("stage", "optimizer", "parameters", "accumulation"), CASES)
def test_training_equals_one_plain_process(
    request: pytest.FixtureRequest,
    two_ranks: RankPool,
    tmp_path: Path,
    stage: int,
    optimizer: str,
    parameters: str,
    accumulation: int,
) -> None:
    if "nvme" in (optimizer, parameters):
        request.getfixturevalue("nvme")
    config = with_zero(tiny(batch=4 * accumulation, micro=2, steps=STEPS), stage, optimizer, parameters)
    config = nvme_sized(config, tmp_path)
    ranks = two_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    reference = plain.train(config, STEPS)
    model = config["megagpt"]["model"]
    assert_equal_training(ranks, reference, model["hidden_size"] // model["num_heads"], tolerance=2e-5)
    elements = sum(values.numel() for values in reference.state["weight"].values())
    assert_mechanism_acted(ranks, stage, optimizer, parameters, elements)


@pytest.mark.usefixtures("nvme")
def test_bf16_parameters_on_nvme_equal_those_in_host_memory(two_ranks: RankPool, tmp_path: Path) -> None:
    """DeepSpeed swaps 16-bit parameters only; matrices are wide enough that each rank's shard reaches its 1 MiB."""
    shape = {"num_layers": 1, "hidden_size": 512, "sequence_length": 8}
    config = tiny(batch=4, micro=2, steps=2, **shape) | {"bf16": {"enabled": True}}
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    cells = {
        "cpu": zero | {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        "nvme": zero
        | {"offload_optimizer": on_disk, "offload_param": on_disk | {"max_in_cpu": 0, "buffer_size": 2**20}},
    }
    runs = {
        name: two_ranks.run("tests.jobs:train", config=config | {"zero_optimization": cell}, steps=2)
        for name, cell in cells.items()
    }
    assert [r.loss for r in runs["nvme"][0]["results"]] == [r.loss for r in runs["cpu"][0]["results"]]
    like = plain.train(config, 2)
    assert [r.loss for r in runs["cpu"][0]["results"]] == pytest.approx(like.losses, rel=1e-2)
    in_memory, swapped = (whole_tensors(rank["state"] for rank in runs[name]) for name in ("cpu", "nvme"))
    assert in_memory.keys() == swapped.keys()
    for key, values in in_memory.items():
        torch.testing.assert_close(swapped[key], values, rtol=0, atol=1e-7, msg="/".join(key))
    for rank in runs["nvme"]:
        files = rank["evidence"]["swap_files"]
        assert any("param" in name for name, _ in files), files
        assert rank["evidence"]["elements_on_nvme"] >= 2 * 512 * 2048 / 2, "both MLP matrices, half of each on a rank"


FAST_PIPELINES = {
    (1, "cpu", "1f1b", 1, "per_step"),
    (1, "none", "gpipe", 1, "per_micro_batch"),
    (2, "none", "interleaved", 2, "per_step"),
    (3, "none", "1f1b", 1, "per_step"),
    (3, "none", "interleaved", 2, "per_step"),
    (3, "cpu", "interleaved", 2, "per_micro_batch"),
}
PIPELINES = [
    pytest.param(*case, marks=() if case in FAST_PIPELINES else pytest.mark.slow)
    for case in (
        (stage, optimizer, schedule, virtual, reduction)
        for stage, optimizer in ((1, "none"), (1, "cpu"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu"))
        for schedule, virtual in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2))
        for reduction in ("per_step", "per_micro_batch")
    )
]


@pytest.mark.parametrize(("stage", "optimizer", "schedule", "virtual", "reduction"), PIPELINES)
def test_a_pipeline_with_data_parallel_equals_one_plain_process(
    four_ranks: RankPool, stage: int, optimizer: str, schedule: str, virtual: int, reduction: str
) -> None:
    """Pipeline 2 x data 2; five blocks, so that stages are uneven; tied where two copies' gradients can be added."""
    shape = {"num_layers": 5, "tie_embeddings": reduction == "per_step" or stage == 3}
    config = with_zero(tiny(batch=16, micro=2, steps=STEPS, **shape), stage, optimizer)
    config["megagpt"]["parallel"] = {
        "pipeline": 2,
        "schedule": schedule,
        "virtual_stages": virtual,
        "gradient_reduction": reduction,
    }
    ranks = four_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    assert_equal_training(ranks, plain.train(config, STEPS), 8, tolerance=2e-5)
    for rank in ranks:
        seen = rank["evidence"]
        assert seen["stage_elements"] < seen["whole_elements"]
        assert rank["traffic"]["pipeline", "send"][1] >= 4 * 2 * 16 * 32, "hidden states of each micro-batch"
        assert_a_rank_holds_and_reduces_its_share(
            rank, stage, (optimizer, "none"), config["megagpt"]["parallel"], replicas=2, micro_batches=4
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "optimizer", "parameters"),
    [
        cell
        for cell in CELLS
        if cell[0] > 0 and cell not in {(3, "none", "cpu"), (3, "cpu", "none"), (3, "nvme", "none")}
    ],
)
def test_one_reduction_a_step_without_a_pipeline_equals_one_plain_process(
    request: pytest.FixtureRequest, two_ranks: RankPool, tmp_path: Path, stage: int, optimizer: str, parameters: str
) -> None:
    if optimizer == "nvme":
        request.getfixturevalue("nvme")
    config = with_zero(tiny(batch=12, micro=2, steps=STEPS), stage, optimizer, parameters)
    config = nvme_sized(config, tmp_path)
    config["megagpt"]["parallel"] = {"gradient_reduction": "per_step"}
    ranks = two_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    model = config["megagpt"]["model"]
    assert_equal_training(ranks, plain.train(config, STEPS), model["hidden_size"] // model["num_heads"], 2e-5)
    for rank in ranks:
        assert_a_rank_holds_and_reduces_its_share(
            rank, stage, (optimizer, parameters), config["megagpt"]["parallel"], replicas=2, micro_batches=3
        )


def test_zero_2_keeps_its_share_of_the_gradients_while_a_step_accumulates(two_ranks: RankPool) -> None:
    held = {
        stage: two_ranks.run(
            "tests.jobs:gradients_after_one_micro_batch", config=with_zero(tiny(batch=12, micro=2), stage)
        )
        for stage in (1, 2)
    }
    elements = sum(values.numel() for values in plain.train(tiny(), 0).state["weight"].values())
    assert held[1] == [elements, elements]
    assert all(elements / 2 <= of_rank < 0.6 * elements for of_rank in held[2])  # its half, and the last bucket


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_micro_batches_fewer_and_more_than_stages(two_ranks: RankPool, micro_batches: int) -> None:
    config = with_zero(tiny(batch=2 * micro_batches, micro=2, steps=STEPS, num_layers=3), 3)
    config["megagpt"]["parallel"] = {"pipeline": 2}
    ranks = two_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    assert_equal_training(ranks, plain.train(config, STEPS), 8, tolerance=2e-5)
    for rank in ranks:
        assert 0 < rank["evidence"]["master_elements"] < rank["evidence"]["whole_elements"]
        sent_calls, sent_elements = rank["traffic"]["pipeline", "send"]
        assert (sent_calls, sent_elements) == (micro_batches, micro_batches * 2 * 16 * 32)


PER_MICRO_BATCH = {"gradient_reduction": "per_micro_batch"}
GPIPE, INTERLEAVED = {"schedule": "gpipe"}, {"schedule": "interleaved", "virtual_stages": 2}
OFFLOADED = [  # optimizer, parameters, schedule and reduction
    ("cpu", "cpu", {}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("nvme", "cpu", {}),
            ("nvme", "cpu", GPIPE),
            ("nvme", "cpu", INTERLEAVED),
            ("nvme", "none", PER_MICRO_BATCH),
            ("nvme", "cpu", INTERLEAVED | PER_MICRO_BATCH),
            ("none", "cpu", PER_MICRO_BATCH),
            ("cpu", "cpu", GPIPE | PER_MICRO_BATCH),
            ("cpu", "cpu", INTERLEAVED | PER_MICRO_BATCH),
        )
    ),
]


@pytest.mark.parametrize(("optimizer", "parameters", "order"), OFFLOADED, ids=str)
def test_a_pipeline_with_data_parallel_zero_3_and_offload(
    request: pytest.FixtureRequest,
    four_ranks: RankPool,
    tmp_path: Path,
    optimizer: str,
    parameters: str,
    order: dict[str, Any],
) -> None:
    """Pipeline 2 x data 2: each rank holds half of its stage, and an offload that acts."""
    if optimizer == "nvme":
        request.getfixturevalue("nvme")
    config = nvme_sized(with_zero(tiny(batch=8, micro=2, steps=STEPS), 3, optimizer, parameters), tmp_path)
    config["megagpt"]["model"]["tie_embeddings"] = not (
        optimizer == "nvme" and PER_MICRO_BATCH.items() <= order.items()
    )
    if optimizer == "nvme":
        config["megagpt"]["model"] |= {"num_layers": 8}  # a quarter of it must still reach 1 MiB
    elif "virtual_stages" in order:
        config["megagpt"]["model"] |= {"num_layers": 4}
    config["megagpt"]["parallel"] = {"pipeline": 2} | order
    ranks = four_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    model = config["megagpt"]["model"]
    assert_equal_training(ranks, plain.train(config, STEPS), model["hidden_size"] // model["num_heads"], 2e-5)
    for rank in ranks:
        assert_a_rank_holds_and_reduces_its_share(
            rank, 3, (optimizer, parameters), config["megagpt"]["parallel"], replicas=2, micro_batches=2
        )
