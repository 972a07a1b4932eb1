"""Our table of DeepSpeed's keys against the installed DeepSpeed: a new version's keys must be
noticed, and sorted.

Every key that DeepSpeed reads is either accepted here or refused with a reason, and every accepted
key is one of its.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
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
from megagpt.schema.refused import REFUSED
from tests.support.config_documents import MINIMAL, parse, put, resolve

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
    return {field.alias or name for name, field in model.model_fields.items()}


def refused_below(section: str) -> set[str]:
    return {key.removeprefix(f"{section}.") for key in REFUSED if key.startswith(f"{section}.")}


def test_every_top_level_key_is_accepted_or_refused() -> None:
    read = keys_that_deepspeed_reads()
    accepted = set(keys_of(RunConfig)) - OURS_ALONE
    refused = {key for key in REFUSED if "." not in key}
    assert len(read) > 50, "the recorder must see DeepSpeed's reads"
    assert accepted & refused == set()
    assert read - accepted - refused == set(), "DeepSpeed reads keys that our table does not know"
    assert accepted | refused == read | NOT_IN_THE_CONFIG_CLASS, (
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
def test_every_key_of_a_section_is_accepted_or_refused(
    section: str, ours: type[BaseModel], theirs: set[str]
) -> None:
    accepted = set(keys_of(ours))
    refused = {key for key in refused_below(section) if "." not in key}
    assert accepted & refused == set()
    assert accepted | refused == theirs


def test_every_data_type_is_accepted_or_refused() -> None:
    asked: set[str] = set()
    DeepSpeedConfig({"train_batch_size": 1, "data_types": Recorder({}, asked)})
    assert set(keys_of(DataTypesConfig)) | refused_below("data_types") == asked


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
    assert set(keys_of(params)) | refused_below("scheduler.params") == set(signature.parameters) - {
        "self",
        "optimizer",
    }


def test_a_refused_key_says_what_to_use_and_is_never_accepted() -> None:
    assert set(all_keys(RunConfig)) & set(REFUSED) == set()
    assert all(reason.strip() for reason in REFUSED.values())


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
