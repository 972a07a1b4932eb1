"""Every configuration that ships is read, is legal at the size it is meant for, and trains as a plain process does."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megagpt import plain as plain_process
from megagpt.config import load_config
from megagpt.layout import Layout
from megagpt.legality import World, require_legal
from megagpt.model import GPT
from megagpt.plain import PlainRun
from tests import plain
from tests.equality import assert_rank_ran_its_passes, assert_strays_no_further_than_bf16
from tests.matrix import resolved
from tests.monitoring import REPOSITORY
from tests.ranks import RankPool

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))
CONFIGS = [path for path in FILES if path.name != "schema.json"]
STEPS, SCHEDULE, WARM_UP = 5, 10, 2
LENGTH = 16
GPT_VOCABULARY = 50_257

# name -> (ZeRO stage, where the optimizer works, where the parameters rest)
MECHANISMS = {
    "default": (3, "cpu", "cpu"),
    "gpt2_124m": (2, "none", "none"),
    "gpt2_1.5b_zero3": (3, "none", "none"),
    "gpt3_6.7b_zero3_offload_cpu": (3, "cpu", "none"),
    "gpt3_13b_zero3_offload_nvme": (3, "nvme", "nvme"),
    "gpt3_13b_3d_zero3": (3, "none", "none"),
    "gpt3_175b_3d": (1, "none", "none"),
}
MESHES = ("gpt3_13b_3d_zero3", "gpt3_175b_3d")  # scaled down to pipeline 2 x tensor 2


def test_each_shipped_file_has_a_row_here() -> None:
    assert {path.stem for path in CONFIGS} == set(MECHANISMS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [8, 16])
def test_it_is_legal_where_it_is_meant_to_run(path: Path, ranks: int) -> None:
    config = load_config(path)
    world = World(config.megagpt.parallel.world_size or ranks, vocabulary=GPT_VOCABULARY, bf16_native=True)
    require_legal(config, world=world)
    resolved = world.resolve(config)
    stage, optimizer, parameters = MECHANISMS[path.stem]
    zero = resolved.zero_optimization
    assert (zero.stage, zero.optimizer_device, zero.parameter_device) == (stage, optimizer, parameters)


def scaled_down(path: Path, swap: Path, samples: int) -> dict[str, Any]:
    """The file with a small model, a small batch and few steps, in bf16 as on the GPU it is meant for."""
    document = json.loads(path.read_text())
    document.pop("$schema")
    width = 512 if "nvme" in MECHANISMS[path.stem] else 64  # DeepSpeed swaps shards of 1 MiB and more
    document |= {"train_batch_size": samples, "train_micro_batch_size_per_gpu": 1}
    document["scheduler"]["params"] |= {"total_num_steps": SCHEDULE, "warmup_num_steps": WARM_UP}
    document["megagpt"]["model"] = {
        "num_layers": 4 if path.stem in MESHES else 2,
        "hidden_size": width,
        "num_heads": 4,
        "sequence_length": LENGTH,
        "vocab_size": 256,
    }
    parallel = document["megagpt"].get("parallel", {})
    parallel.pop("world_size", None)
    if path.stem in MESHES:
        parallel |= {"pipeline": 2, "tensor": 2}
    document["megagpt"]["training"] |= {"total_steps": STEPS}
    zero = document["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "nvme":
            zero[part]["nvme_path"] = str(swap)
            if part == "offload_param":
                zero[part]["buffer_size"] = 2**20
        zero.get(part, {}).pop("pin_memory", None)  # pages are pinned for a GPU
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0  # its smallest parameters are this model's largest
    return document


def rate(step: int) -> float:
    """The share of the learning rate that each file's schedule, warm-up and cosine, gives to a step (from 0).

    DeepSpeed counts from the second: the first two are made at zero.
    """
    counted = max(step - 1, 0)
    if counted < WARM_UP:
        return counted / WARM_UP
    progress = (counted + 1 - WARM_UP) / (SCHEDULE - WARM_UP)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def plain_runs(config: dict[str, Any]) -> tuple[PlainRun, PlainRun]:
    """The plain process in fp32, and in bf16: with the schedule, and from where DeepSpeed starts.

    That is from master weights copied from bf16 parameters. From there updates of less than half a step of bf16, as
    the largest models' learning rates make them, reach a forward only once several have added up.
    """
    adam, initialise = plain_process.adam, plain_process.initialise_

    def scheduled(*arguments: Any) -> torch.optim.AdamW:
        optimizer = adam(*arguments)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    def rounded(*arguments: Any) -> GPT:
        return initialise(*arguments).bfloat16().float()

    with patch.multiple(plain_process, adam=scheduled, initialise_=rounded):
        return plain.train(config, STEPS), plain.train(config, STEPS, torch.bfloat16)


RUNS = [
    *((path, "four_ranks" if path.stem in MESHES else "two_ranks") for path in CONFIGS),
    *(pytest.param(path, "eight_ranks", marks=pytest.mark.slow) for path in CONFIGS if path.stem in MESHES),
]


@pytest.mark.parametrize(("path", "pool"), RUNS, ids=lambda value: getattr(value, "stem", value))
def test_it_trains_as_a_plain_process_when_scaled_down_and_its_mechanism_acts(
    request: pytest.FixtureRequest, tmp_path: Path, path: Path, pool: str
) -> None:
    stage, optimizer, parameters = MECHANISMS[path.stem]
    if "nvme" in (optimizer, parameters):
        request.getfixturevalue("nvme")
    pool_of_ranks: RankPool = request.getfixturevalue(pool)
    data = pool_of_ranks.world_size // (4 if path.stem in MESHES else 1)
    samples = 4 * data if path.stem in MESHES else 4
    config = scaled_down(path, tmp_path, samples)
    exact, rounded = plain_runs(config)
    ranks = pool_of_ranks.run("tests.jobs:train", config=config, steps=STEPS)
    assert_strays_no_further_than_bf16(ranks, exact, rounded, samples * LENGTH)
    layout = Layout.of(resolved(config, len(ranks)))
    for index, rank in enumerate(ranks):
        assert_rank_ran_its_passes(rank, layout, index * layout.pipeline // len(ranks))
        seen = rank["evidence"]
        assert seen["parameter_type"] == "torch.bfloat16"
        rates = [config["optimizer"]["params"]["lr"] * rate(step) for step in range(STEPS)]
        assert [result.learning_rate for result in rank["results"]] == pytest.approx(rates)
        assert all(result.applied for result in rank["results"])
        assert seen["master_elements"] == pytest.approx(seen["stage_elements"] / data, rel=0.02)
        assert seen["optimizer_offloaded"] == (optimizer != "none")
        assert seen["adam"] == ("AdamW" if optimizer == "none" else "DeepSpeedCPUAdam")
        if stage == 3:
            assert seen["parameter_elements"] == 0
            assert seen["parameters_offloaded"] == (parameters != "none")
        assert (seen["elements_on_nvme"] > 0) == (parameters == "nvme")
        assert bool(seen["swap_files"]) == (optimizer == "nvme")
        assert (("pipeline", "send") in rank["traffic"]) == (path.stem in MESHES)
        if path.stem in MESHES:  # hidden states of four micro-batches of 16 tokens; losses and norms are a number each
            hidden = 4 * LENGTH * 64
            assert rank["traffic"]["pipeline", "send"][1] >= hidden
            assert rank["traffic"]["tensor", "all_reduce"][1] >= 4 * hidden
            assert seen["stage_elements"] < 0.4 * seen["whole_elements"]
