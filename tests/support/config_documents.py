"""A small complete configuration that tests change one key at a time."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from megagpt.config import ConfigError, ResolvedConfig, RunConfig

MINIMAL: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 20},
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "megagpt": {
        "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "sequence_length": 32},
        "training": {"total_steps": 100},
    },
}


def put(document: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """A copy of the document with `a.b.c` set to the value."""
    changed = copy.deepcopy(document)
    here = changed
    *parents, last = key.split(".")
    for name in parents:
        here = here.setdefault(name, {})
    here[last] = value
    return changed


def parse(document: dict[str, Any]) -> RunConfig:
    return RunConfig.from_json(json.dumps(document), "x.json")


def errors_of(document: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(document)
    return caught.value.errors


def resolve(
    document: dict[str, Any], world_size: int = 2, vocabulary: int | None = 1000
) -> ResolvedConfig:
    return parse(document).resolved(world_size=world_size, vocabulary=vocabulary, bf16_native=False)


def resolve_errors(
    document: dict[str, Any], world_size: int = 2, vocabulary: int | None = 1000
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(document, world_size, vocabulary)
    return caught.value.errors
