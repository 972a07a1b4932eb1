"""The table of what composes: one refused configuration for each row, and proof that its remedy is legal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagpt import planner
from megagpt.config import ConfigError, RunConfig, load_config
from tests.config_documents import MINIMAL, put

NVME = {"device": "nvme", "nvme_path": "swap"}
CASES: list[tuple[dict[str, Any], str]] = [  # changes to the minimal (ZeRO 3) configuration; words of the reason
    ({"megagpt.parallel.tensor": 3}, "as many key-value heads"),
    (
        {"megagpt.parallel": {"tensor": 2, "sequence": True}, "megagpt.model.sequence_length": 127},
        "as many positions as any other",
    ),
    ({"megagpt.parallel.pipeline": 2, "zero_optimization": {"stage": 0}}, "without a ZeRO optimizer"),
    ({"megagpt.parallel.pipeline": 50}, "a stage would have no block"),
    ({"megagpt.parallel.pipeline": 2, "fp16.enabled": True, "bf16.enabled": False}, "scale the gradients"),
    (
        {"megagpt.model.num_layers": 8, "megagpt.parallel": {"pipeline": 2, "virtual_stages": 2}},
        "only the interleaved schedule",
    ),
    (
        {"megagpt.model.num_layers": 8, "megagpt.parallel": {"pipeline": 2, "schedule": "interleaved"}},
        "interleaves several stages",
    ),
    (
        {
            "megagpt.parallel": {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
            "megagpt.model.num_layers": 8,
            "train_batch_size": 10,
            "train_micro_batch_size_per_gpu": 1,
        },
        "in equal rounds",
    ),
    (
        {"megagpt.parallel": {"pipeline": 2, "gradient_reduction": "per_micro_batch"}},
        "copies of a tied embedding",
    ),
    (
        {
            "megagpt.parallel": {
                "pipeline": 2,
                "schedule": "interleaved",
                "virtual_stages": 2,
                "gradient_reduction": "per_micro_batch",
            },
            "megagpt.model": {"num_layers": 8, "hidden_size": 64, "num_heads": 4, "tie_embeddings": False},
            "zero_optimization": {"stage": 1, "overlap_comm": True},
        },
        "of one of a rank's stages only",
    ),
    (
        {"megagpt.parallel.pipeline": 2, "zero_optimization.offload_param": NVME, "bf16.enabled": True},
        "parameters on NVMe",
    ),
    ({"megagpt.parallel.schedule": "gpipe"}, "orders the micro-batches"),
    ({"megagpt.parallel.virtual_stages": 2}, "cuts the stages"),
    ({"megagpt.parallel.sequence": True}, "splits the norms"),
    (
        {"zero_optimization": {"stage": 0}, "megagpt.parallel.gradient_reduction": "per_step"},
        "coalesced reduction needs a ZeRO optimizer",
    ),
    ({"zero_optimization.stage": 0}, "no partitioned optimizer state"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, "no swap file ever appears"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "ignores parameter offload below"),
    ({"zero_optimization.offload_param": NVME, "bf16.enabled": False}, "computes in fp32"),
    (
        {"zero_optimization.offload_param": {**NVME, "buffer_size": 100}, "bf16.enabled": True},
        "does not fit into one I/O buffer",
    ),
    ({"data_types.grad_accum_dtype": "bf16", "bf16.enabled": False}, "less exact than the model"),
    ({"bf16.enabled": True, "zero_optimization": {"stage": 0}}, "optimizers of another kind"),
    (
        {
            "data_types.grad_accum_dtype": "fp32",
            "bf16.enabled": True,
            "megagpt.parallel.gradient_reduction": "per_step",
        },
        "before it converts them",
    ),
    (
        {"data_types.grad_accum_dtype": "fp32", "bf16.enabled": True, "zero_optimization": {"stage": 1}},
        "BF16_Optimizer",
    ),
]


def write(tmp_path: Path, changes: dict[str, Any]) -> Path:
    document = MINIMAL
    for key, value in changes.items():
        document = put(document, key, value)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    return path


def as_resolved(config: RunConfig) -> RunConfig:
    """What the trainer checks last; a mesh that no rank count of the test fits stays as it was read."""
    replica = config.megagpt.parallel.model_parallel_size
    return config.resolved(world_size=2 * replica, vocabulary=1000, bf16_native=False)


def test_every_row_has_a_case() -> None:
    reasons = [reason for _, reason in CASES]
    rows_hit = [sum(words in rule.reason for words in reasons) for rule in planner.RULES]
    assert rows_hit == [1] * len(planner.RULES)


@pytest.mark.parametrize(("changes", "reason"), CASES, ids=[reason for _, reason in CASES])
def test_a_row_refuses_and_its_remedy_is_legal(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = write(tmp_path, changes)
    config = as_resolved(load_config(path))
    (rule,) = planner.refusals(config)
    assert reason in rule.reason
    with pytest.raises(ConfigError) as caught:
        planner.require_legal(config, "x.json")
    remedy = rule.remedy_for(config)
    assert caught.value.errors == [f"x.json: {rule.line(config)}"]
    assert caught.value.errors[0].endswith(f"nearest legal: --set {remedy}")
    assert planner.refusals(as_resolved(load_config(path, [remedy]))) == []


def test_all_refusals_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {"megagpt.parallel.schedule": "gpipe", "megagpt.parallel.sequence": True})
    with pytest.raises(ConfigError) as caught:
        planner.require_legal(load_config(path))
    assert [line.split(":")[0] for line in caught.value.errors] == [
        "megagpt.parallel.schedule",
        "megagpt.parallel.sequence",
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", [None, "cpu", "nvme"])
@pytest.mark.parametrize("parameters", [None, "cpu", "nvme"])
def test_exactly_the_offload_cells_that_act_are_legal(
    tmp_path: Path, stage: int, optimizer: str | None, parameters: str | None
) -> None:
    zero: dict[str, Any] = {"stage": stage}
    for section, device in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        if device:
            zero[section] = NVME if device == "nvme" else {"device": device}
    config = load_config(write(tmp_path, {"zero_optimization": zero, "bf16.enabled": stage > 0}))
    acts = (optimizer is None or stage == 3 or (optimizer == "cpu" and stage > 0)) and (
        parameters is None or stage == 3
    )
    assert (planner.refusals(config) == []) is acts


def test_auto_precision_is_judged_when_it_is_known(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {"zero_optimization.offload_param": NVME}))
    assert planner.refusals(config) == []
    on_gpu = config.resolved(world_size=2, vocabulary=1000, bf16_native=True)
    on_cpu = config.resolved(world_size=2, vocabulary=1000, bf16_native=False)
    assert planner.refusals(on_gpu) == []
    assert [rule.key for rule in planner.refusals(on_cpu)] == ["zero_optimization.offload_param.device"]
