"""Our table of DeepSpeed's keys against the installed DeepSpeed: a new version's keys must be
noticed, and sorted.

Every key that DeepSpeed reads is either accepted here or has a class in the table of foreign keys,
and every accepted key is one of its.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.monitor.config import TensorBoardConfig as DeepSpeedTensorBoard
from deepspeed.monitor.config import WandbConfig as DeepSpeedWandb
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from pydantic import BaseModel
from torch.optim import SGD

from megagpt.config import RunConfig
from megagpt.schema.deepspeed import (
    AioConfig,
    Bf16Config,
    DataTypesConfig,
    Fp16Config,
    OffloadOptimizerConfig,
    OffloadParamConfig,
    TensorboardConfig,
    WandbConfig,
    WarmupCosineLRParams,
    WarmupDecayLRParams,
    WarmupLRParams,
    ZeroConfig,
)
from megagpt.schema.errors import all_keys, keys_of
from megagpt.schema.foreign import ALL_FALSE, FOREIGN, OFF, ForeignKey
from tests.support.config_documents import MINIMAL, errors_of, parse, put, resolve

OURS_ALONE = {"megagpt", "$schema"}
NOT_IN_THE_CONFIG_CLASS = {
    "sequence_parallel_size"
}  # DeepSpeed reads it only where no mpu is given


class Recorder(dict[str, Any]):
    """A configuration that notes which keys DeepSpeed asks for, in itself and in the copies that
    DeepSpeed makes.
    """

    def __init__(self, items: dict[str, Any], asked: set[str]) -> None:
        super().__init__(items)
        self.asked = asked

    def __copy__(self) -> Recorder:
        return Recorder(dict(self), self.asked)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().keys()))


def keys_that_deepspeed_reads() -> set[str]:
    """Top-level keys, those removed from DeepSpeed included."""
    asked: set[str] = set()
    DeepSpeedConfig(Recorder({"train_batch_size": 1}, asked))
    return asked


def fields(model: type[BaseModel]) -> set[str]:
    """The names of a section's keys and their aliases: DeepSpeed takes both."""
    both = {(name, field.alias or name) for name, field in model.model_fields.items()}
    return {name for names in both for name in names}


FOREIGN_KEYS = {row.key for row in FOREIGN}
# Keys of the table that this DeepSpeed does not read, and so ignores.
NOT_READ = {"comms_config", "monitor_config", "aio.thread_count"}


def foreign_below(section: str) -> set[str]:
    keys = FOREIGN_KEYS - NOT_READ
    return {key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")}


def test_every_top_level_key_is_accepted_or_classed() -> None:
    read = keys_that_deepspeed_reads()
    accepted = set(keys_of(RunConfig)) - OURS_ALONE
    foreign = {key for key in FOREIGN_KEYS - NOT_READ if "." not in key}
    assert len(read) > 50, "the recorder must see DeepSpeed's reads"
    assert accepted & foreign == set()
    assert read - accepted - foreign == set(), "DeepSpeed reads keys that our table does not know"
    assert accepted | foreign == read | NOT_IN_THE_CONFIG_CLASS, (
        "our table has keys that DeepSpeed does not read"
    )


SECTIONS = [
    (
        "zero_optimization",
        ZeroConfig,
        fields(DeepSpeedZeroConfig) | set(deepspeed_config._REMOVED_ZERO_CONFIG_KEYS),
    ),
    (
        "zero_optimization.offload_optimizer",
        OffloadOptimizerConfig,
        fields(DeepSpeedZeroOffloadOptimizerConfig),
    ),
    (
        "zero_optimization.offload_param",
        OffloadParamConfig,
        fields(DeepSpeedZeroOffloadParamConfig),
    ),
    ("bf16", Bf16Config, fields(DeepSpeedBF16Config)),
    ("fp16", Fp16Config, fields(DeepSpeedFP16Config)),
    ("wandb", WandbConfig, fields(DeepSpeedWandb)),
    ("tensorboard", TensorboardConfig, fields(DeepSpeedTensorBoard)),
    ("aio", AioConfig, set(AIO_DEFAULT_DICT)),
]


@pytest.mark.parametrize(
    ("section", "ours", "theirs"), SECTIONS, ids=[section for section, *_ in SECTIONS]
)
def test_every_key_of_a_section_is_accepted_or_classed(
    section: str, ours: type[BaseModel], theirs: set[str]
) -> None:
    accepted = set(keys_of(ours))
    foreign = {key for key in foreign_below(section) if "." not in key}
    assert accepted & foreign == set()
    assert accepted | foreign == theirs


def test_every_data_type_is_accepted_or_classed() -> None:
    asked: set[str] = set()
    DeepSpeedConfig({"train_batch_size": 1, "data_types": Recorder({}, asked)})
    assert set(keys_of(DataTypesConfig)) | foreign_below("data_types") == asked


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("WarmupLR", WarmupLRParams),
        ("WarmupDecayLR", WarmupDecayLRParams),
        ("WarmupCosineLR", WarmupCosineLRParams),
    ],
)
def test_schedules_have_deepspeeds_parameters(name: str, params: type[BaseModel]) -> None:
    signature = inspect.signature(getattr(lr_schedules, name).__init__)
    assert set(keys_of(params)) | foreign_below("scheduler.params") == set(signature.parameters) - {
        "self",
        "optimizer",
    }


def test_a_foreign_key_has_a_reason_and_is_never_a_field() -> None:
    assert set(all_keys(RunConfig)) & FOREIGN_KEYS == set()
    assert all(row.reason.strip() or row.becomes for row in FOREIGN)
    assert len(FOREIGN_KEYS) == len(FOREIGN)


REMOVED = {*deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS} | {
    f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS
}
OTHERWISE_HARMLESS = {  # keys that DeepSpeed records and then does nothing with
    "comms_logger",  # comm.configure passes `enabled` on, which is false
    "tensor_parallel",  # the engine asks for an autotp_size above 1 (engine.py:595)
    "weight_quantization",  # inference alone reads it
    "zero_optimization.cpu_offload_use_pin_memory",  # deprecated there, without effect
}


def attributes(document: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's own parser makes of a file."""
    found = vars(DeepSpeedConfig({"train_batch_size": 1} | document))
    return {
        name: value.model_dump()
        if isinstance(value, BaseModel)
        else getattr(value, "__dict__", value)
        for name, value in found.items()
        if name != "_param_dict"
    }


def harmless_values() -> Iterator[tuple[str, Any]]:
    for row in FOREIGN:
        if row.key in REMOVED | OTHERWISE_HARMLESS or row.key.startswith(
            ("optimizer.", "scheduler.")
        ):
            continue
        for value in row.nothing_at:
            if value == OFF:
                yield row.key, {"enabled": False}
            elif value != ALL_FALSE:
                yield row.key, value


@pytest.mark.parametrize(("key", "value"), list(harmless_values()))
def test_a_value_that_changes_nothing_is_deepspeeds_default(key: str, value: object) -> None:
    base: dict[str, Any] = {"zero_optimization": {"stage": 3}, "aio": {}}
    if "offload_optimizer" in key:
        base = put(base, "zero_optimization.offload_optimizer", {"device": "cpu"})
    given = attributes(put(base, key, value))
    plain = attributes(base)
    for attribute, default in plain.items():
        if isinstance(default, dict) and isinstance(given[attribute], dict):
            left = {name: default[name] for name in default.keys() & given[attribute].keys()}
            assert left.items() <= given[attribute].items(), attribute
        else:
            assert given[attribute] == default, attribute


@pytest.mark.parametrize(
    "row", [row for row in FOREIGN if "zero_optimization.stage3" in row.becomes]
)
def test_deepspeed_takes_its_other_names_for_the_same(row: ForeignKey) -> None:
    theirs, ours = row.path[-1], row.becomes.rpartition(".")[2]
    by_name, by_alias = (DeepSpeedZeroConfig(stage=3, **{key: 1}) for key in (theirs, ours))
    assert by_name == by_alias != DeepSpeedZeroConfig(stage=3)


def test_deepspeed_takes_cpu_offload_for_an_offload_section() -> None:
    assert DeepSpeedZeroConfig(stage=2, cpu_offload=True).offload_optimizer.device == "cpu"
    assert DeepSpeedZeroConfig(stage=3, cpu_offload_param=True).offload_param.device == "cpu"
    assert (
        DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": True}).zero_config.stage == 1
    )
    old = {"train_batch_size": 1, "bfloat16": {"enabled": True}}
    assert DeepSpeedConfig(old).bfloat16_config.enabled


def test_auto_is_absent_to_deepspeed() -> None:
    sizes = {"reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    assert DeepSpeedZeroConfig(stage=3, **sizes) == DeepSpeedZeroConfig(stage=3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 20}}},
        {"fp16": {"enabled": True, "initial_scale_power": 8}, "bf16": {"enabled": False}},
        {"zero_optimization": {"stage": 1, "use_multi_rank_bucket_allreduce": True}},
        {
            "aio": {"queue_depth": 4},
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "nvme", "nvme_path": "d"},
            },
        },
        {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"},
    ],
)
def test_deepspeed_takes_what_we_hand_it(changes: dict[str, Any]) -> None:
    document = MINIMAL
    for key, value in changes.items():
        document = put(document, key, value)
    run = resolve(document, world_size=1)
    taken = DeepSpeedConfig(run.deepspeed_dict())
    assert taken.train_batch_size == run.train_batch_size
    assert taken.gradient_accumulation_steps == run.gradient_accumulation_steps
    assert taken.zero_optimization_stage == run.zero_optimization.stage
    assert taken.gradient_clipping == run.gradient_clipping
    assert taken.optimizer_params["lr"] == run.optimizer.params.lr


def test_defaults_that_we_write_out_are_deepspeeds_own() -> None:
    """A section that is absent from a file must mean what it means to DeepSpeed."""
    ours_and_theirs = [
        (Fp16Config().model_dump(), DeepSpeedFP16Config().model_dump()),
        (Bf16Config().model_dump(), DeepSpeedBF16Config().model_dump()),
        (AioConfig().model_dump(), AIO_DEFAULT_DICT),
    ]
    for ours, theirs in ours_and_theirs:
        assert ours == {key: theirs[key] for key in ours}
    assert parse(MINIMAL).gradient_clipping == deepspeed_config.GRADIENT_CLIPPING_DEFAULT
    assert DeepSpeedZeroOffloadOptimizerConfig().pin_memory is OffloadOptimizerConfig().pin_memory
    assert DeepSpeedZeroOffloadParamConfig().pin_memory is OffloadParamConfig().pin_memory


def test_a_warm_up_of_one_step_is_deepspeeds_two() -> None:
    """DeepSpeed rejects one of no steps."""
    key = "scheduler.params.warmup_num_steps"
    config = parse(put(MINIMAL, key, 1))
    assert config.as_written() == parse(put(MINIMAL, key, 2)).as_written()
    assert any(line.startswith(f"{key}: 1 is 2 to DeepSpeed") for line in config.notes)
    assert lr_schedules.WarmupLR(SGD([torch.zeros(1)]), warmup_num_steps=1).warmup_num_steps == 2
    assert errors_of(put(MINIMAL, key, 0)) == [f"x.json: {key}: must be at least 2, got 0"]
    with pytest.raises(ValueError, match="must be a positive integer"):
        lr_schedules.WarmupLR(SGD([torch.zeros(1)]), warmup_num_steps=0)
