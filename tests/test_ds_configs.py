"""Every configuration that ships is read, is legal at the size it is meant for, and trains when it is scaled down."""

import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import load_config
from megagpt.legality import World, require_legal
from tests.monitoring import REPOSITORY
from tests.ranks import RankPool

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))
CONFIGS = [path for path in FILES if path.name != "schema.json"]
STEPS = 2
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


def scaled_down(path: Path, swap: Path) -> dict[str, Any]:
    """The file with a small model, a small batch and two steps, in bf16 as on the GPU it is meant for."""
    document = json.loads(path.read_text())
    document.pop("$schema")
    width = 512 if "nvme" in MECHANISMS[path.stem] else 64  # DeepSpeed swaps shards of 1 MiB and more
    document |= {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1}
    document["scheduler"]["params"] |= {"total_num_steps": 10, "warmup_num_steps": 2}
    document["megagpt"]["model"] = {
        "num_layers": 4 if path.stem in MESHES else 2,
        "hidden_size": width,
        "num_heads": 4,
        "sequence_length": 16,
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains_when_scaled_down_and_its_mechanism_acts(
    request: pytest.FixtureRequest, tmp_path: Path, path: Path
) -> None:
    stage, optimizer, parameters = MECHANISMS[path.stem]
    if "nvme" in (optimizer, parameters):
        request.getfixturevalue("nvme")
    pool: RankPool = request.getfixturevalue("four_ranks" if path.stem in MESHES else "two_ranks")
    for rank in pool.run("tests.jobs:train", config=scaled_down(path, tmp_path), steps=STEPS):
        seen = rank["evidence"]
        assert seen["parameter_type"] == "torch.bfloat16"
        assert all(result.applied and result.loss > 0 for result in rank["results"])
        assert seen["optimizer_offloaded"] == (optimizer != "none")
        assert seen["adam"] == ("AdamW" if optimizer == "none" else "DeepSpeedCPUAdam")
        if stage == 3:
            assert seen["parameter_elements"] == 0
            assert seen["parameters_offloaded"] == (parameters != "none")
        assert (seen["elements_on_nvme"] > 0) == (parameters == "nvme")
        assert bool(seen["swap_files"]) == (optimizer == "nvme")
        assert (("pipeline", "send") in rank["traffic"]) == (path.stem in MESHES)
        if path.stem in MESHES:  # hidden states of four micro-batches of 16 tokens; losses and norms are a number each
            hidden = 4 * 16 * 64
            assert rank["traffic"]["pipeline", "send"][1] >= hidden
            assert rank["traffic"]["tensor", "all_reduce"][1] >= 4 * hidden
            assert seen["stage_elements"] < 0.4 * seen["whole_elements"]
